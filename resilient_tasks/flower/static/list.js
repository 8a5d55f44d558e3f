// The table of all breakers, live. Only cells that have changed are written.
import {
    NOTHING, age, ask, badge, byId, deadLettersUrl, duration, el, figures, get, live, mayAct, pageUrl, urgency, wait,
} from "./common.js";

const COUNTING = 15000; // ms between two counts of dead letters, each of which asks the broker for every queue

const page = byId("breakers-page");
const table = byId("breakers-table");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const TITLES = heads.map((cell) => cell.textContent.trim());
const COLUMNS = heads.slice(2, -1).map((cell) => cell.dataset.column);
const NUMBERS = new Set(["evidence", "failed", "slow", "calls", "deferred", "dead"]);
const LINKED = new Set(["deferred", "dead"]); // to that part of the breaker's page
// By what each column sorts; text sorts upwards at first, all others from the highest down.
const SORTED = {
    name: ({name}) => name,
    state: ({state}) => -urgency(state),
    evidence: ({evidence, slow_evidence: slow}) => Math.max(evidence, slow),
    failed: ({failure_rate: rate}) => rate,
    slow: ({slow_rate: rate}) => rate,
    calls: ({calls}) => calls,
    deferred: ({deferred}) => deferred,
    dead: ({name}) => dead?.[name] ?? 0,
    oldest: wait,
    since: (breaker) => age(breaker) ?? Infinity,
    reason: ({reason}) => reason,
    probe: ({now, next_probe_at: at}) => (at === null ? Infinity : at - now),
    recovery: ({estimate}) => estimate?.done_in ?? (estimate ? Infinity : -1),
};
const UPWARDS = new Set(["name", "reason", "since", "probe"]);

const rows = new Map();
const title = document.title;
let latest = [];
let dead = null; // number of dead letters by breaker, once they have been counted
let sorting = {column: "", downwards: true}; // "": what is urgent first
let refresh = () => {};

function newRow(name) {
    const state = el("td");
    const cells = Object.fromEntries(COLUMNS.map((column) => [column, el("td", {class: classOf(column)})]));
    const row = el(
        "tr", {"data-breaker": name}, el("td", {}, el("a", {href: pageUrl(name)}, name)), state,
        ...Object.values(cells), el("td", {}, ...actions(name)),
    );
    [...row.cells].forEach((cell, place) => cell.setAttribute("data-title", TITLES[place])); // for narrow windows
    return {row, state, cells};
}

function classOf(column) {
    return NUMBERS.has(column) ? "text-end" : column;
}

function actions(name) {
    if (!mayAct) {
        return [];
    }
    const button = el("button", {type: "button", class: "btn btn-outline-primary btn-sm"}, "Act…");
    button.addEventListener("click", () => ask(latest.find((each) => each.name === name), null, () => refresh()));
    return [button];
}

function write({row, state, cells}, breaker) {
    const count = dead?.[breaker.name] ?? 0;
    const unknown = dead === null || breaker.name.includes(":"); // those of a child are among its parent's
    const shown = {...figures(breaker), dead: unknown ? NOTHING : count.toLocaleString()};
    if (state.textContent !== breaker.state) {
        state.replaceChildren(badge(breaker.state));
        row.dataset.state = breaker.state;
    }
    for (const column of COLUMNS) {
        const cell = cells[column];
        if (cell.textContent !== shown[column]) {
            const linked = LINKED.has(column) && !["0", NOTHING].includes(shown[column]);
            const link = {href: `${pageUrl(breaker.name)}#${column}`};
            cell.replaceChildren(linked ? el("a", link, shown[column]) : shown[column]);
            cell.classList.toggle("nothing", ["0", "0%", NOTHING].includes(shown[column]));
        }
    }
}

function byUrgency(one, other) {
    return urgency(one.state) - urgency(other.state) || other.deferred - one.deferred ||
        one.name.localeCompare(other.name);
}

function byColumn(one, other) {
    const value = SORTED[sorting.column];
    if (value === undefined) {
        return byUrgency(one, other);
    }
    const [first, second] = [value(one), value(other)];
    const order = typeof first === "string" ? first.localeCompare(second) : Math.sign(first - second) || 0;
    return (sorting.downwards ? -order : order) || byUrgency(one, other);
}

function show({breakers}) {
    latest = [...breakers].sort(byColumn);
    for (const breaker of latest) {
        if (!rows.has(breaker.name)) {
            rows.set(breaker.name, newRow(breaker.name));
        }
        write(rows.get(breaker.name), breaker);
    }
    const order = latest.map(({name}) => rows.get(name).row);
    if (order.length !== body.rows.length || order.some((row, place) => row !== body.rows[place])) {
        body.replaceChildren(...order);
    }
    filter();
    summarise(breakers);
}

function summarise(breakers) {
    const closed = breakers.filter(({state}) => state === "CLOSED").length;
    const others = breakers.length - closed;
    document.title = others ? `(${others}) ${title}` : title;
    byId("count-closed").textContent = closed.toLocaleString();
    byId("count-others").textContent = others.toLocaleString();
    byId("count-deferred").textContent = breakers.reduce((sum, {deferred}) => sum + deferred, 0).toLocaleString();
    const longest = Math.max(0, ...breakers.map(wait));
    byId("oldest-wait").textContent = longest ? duration(longest) : NOTHING;
}

async function countDead() {
    const card = byId("count-dead");
    try {
        dead = await get(deadLettersUrl);
        card.textContent = Object.values(dead).reduce((sum, count) => sum + count, 0).toLocaleString();
        card.title = dead.undecodable ? `${dead.undecodable} of them are undecodable and no breaker's` : "";
    } catch (error) {
        dead = null;
        card.textContent = "?";
        card.title = error.message;
    }
    show({breakers: latest});
}

async function keepCounting() {
    if (!document.hidden) {
        await countDead();
    }
    if (page.dataset.refresh === "1") {
        window.setTimeout(keepCounting, COUNTING);
    }
}

function filter() {
    const wanted = byId("filter").value.trim().toLowerCase();
    for (const [name, {row}] of rows) {
        row.hidden = !`${name} ${row.dataset.state}`.toLowerCase().includes(wanted);
    }
}

// --- order -----------------------------------------------------------------------------------------

// One way, then the other, then what is urgent first again.
function sortBy(column) {
    const first = !UPWARDS.has(column);
    if (sorting.column !== column) {
        sorting = {column, downwards: first};
    } else {
        sorting = sorting.downwards === first ? {column, downwards: !first} : {column: "", downwards: true};
    }
    byId("sort").value = sorting.column;
    for (const cell of heads) {
        if (cell.dataset.column === sorting.column) {
            cell.setAttribute("aria-sort", sorting.downwards ? "descending" : "ascending");
        } else {
            cell.removeAttribute("aria-sort");
        }
    }
    show({breakers: latest});
}

for (const cell of heads.filter((each) => each.dataset.column)) {
    const label = cell.textContent;
    const button = el("button", {type: "button", class: "sort"}, label);
    button.addEventListener("click", () => sortBy(cell.dataset.column));
    cell.replaceChildren(button);
    byId("sort").append(el("option", {value: cell.dataset.column}, label));
}
byId("sort").addEventListener("change", () => {
    sorting = {column: "", downwards: true};
    sortBy(byId("sort").value);
});
byId("filter").addEventListener("input", filter);
refresh = live(page, pageUrl(), show);
keepCounting();
