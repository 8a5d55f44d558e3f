// The table of all breakers, live. Only cells that have changed are written.
import {NOTHING, ask, badge, byId, duration, el, figures, live, mayAct, pageUrl, urgency} from "./common.js";

const page = byId("breakers-page");
const body = byId("breakers-table").tBodies[0];
const TITLES = [...byId("breakers-table").tHead.rows[0].cells].map((cell) => cell.textContent);
const COLUMNS = ["evidence", "failed", "slow", "calls", "deferred", "oldest", "since", "reason", "probe", "recovery"];
const NUMBERS = new Set(["evidence", "failed", "slow", "calls", "deferred"]);
const rows = new Map();
const title = document.title;
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
    button.addEventListener("click", () => ask(name, null, () => refresh()));
    return [button];
}

function write({row, state, cells}, breaker) {
    const shown = figures(breaker);
    if (state.textContent !== breaker.state) {
        state.replaceChildren(badge(breaker.state));
        row.dataset.state = breaker.state;
    }
    for (const column of COLUMNS) {
        const cell = cells[column];
        if (cell.textContent !== shown[column]) {
            const linked = column === "deferred" && breaker.deferred;
            const link = {href: `${pageUrl(breaker.name)}#deferred`};
            cell.replaceChildren(linked ? el("a", link, shown[column]) : shown[column]);
            cell.classList.toggle("nothing", shown[column] === NOTHING);
        }
    }
}

function byUrgency(one, other) {
    return urgency(one.state) - urgency(other.state) || other.deferred - one.deferred ||
        one.name.localeCompare(other.name);
}

function show({breakers}) {
    const sorted = [...breakers].sort(byUrgency);
    for (const breaker of sorted) {
        if (!rows.has(breaker.name)) {
            rows.set(breaker.name, newRow(breaker.name));
        }
        write(rows.get(breaker.name), breaker);
    }
    const order = sorted.map(({name}) => rows.get(name).row);
    if (order.length !== body.rows.length || order.some((row, place) => row !== body.rows[place])) {
        body.replaceChildren(...order);
    }
    filter();
    summarise(breakers);
}

function summarise(breakers) {
    const closed = breakers.filter(({state}) => state === "CLOSED").length;
    const waits = breakers.map(({now, oldest_deferred_at: oldest}) => (oldest === null ? 0 : now - oldest));
    const others = breakers.length - closed;
    document.title = others ? `(${others}) ${title}` : title;
    byId("count-closed").textContent = closed.toLocaleString();
    byId("count-others").textContent = others.toLocaleString();
    byId("count-deferred").textContent = breakers.reduce((sum, {deferred}) => sum + deferred, 0).toLocaleString();
    const longest = Math.max(0, ...waits);
    byId("oldest-wait").textContent = longest ? duration(longest) : NOTHING;
}

function filter() {
    const wanted = byId("filter").value.trim().toLowerCase();
    for (const [name, {row}] of rows) {
        row.hidden = !`${name} ${row.dataset.state}`.toLowerCase().includes(wanted);
    }
}

byId("filter").addEventListener("input", filter);
refresh = live(page, pageUrl(), show);
