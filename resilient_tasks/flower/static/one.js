// One breaker, live; its tasks when asked for, because a look at them costs the broker something.
import {
    NOTHING, admits, applies, ask, badge, byId, capitalized, el, figures, get, live, mayAct, moment, pageUrl, perSecond,
    post, short, sure, taskUrl, toast, why,
} from "./common.js";

import {draw, perSecondOf} from "./chart.js";

const page = byId("breaker-page");
const name = page.dataset.name;
const VERBS = {deferred: ["resume", "drop"], dead: ["replay", "drop"]};
const NOUNS = {deferred: ["deferred task", "deferred tasks"], dead: ["dead letter", "dead letters"]};
const PAST = {resume: "resumed", drop: "dropped", replay: "replayed"};
const AT_ONCE = 200; // tasks of one request
const SEARCHED = 5000; // tasks that can be found, and selected, at once

// --- figures -------------------------------------------------------------------------------------

let remembered = null; // epoch of the breaker, and ten seconds, that chart and log show
let past = null;
let logged = "";
let latest = null;

function show({breaker}) {
    if (!breaker) {
        return;
    }
    latest = breaker;
    const present = `${breaker.epoch} ${Math.floor(breaker.now / 10)}`;
    if (present !== remembered) {
        remembered = present;
        remember().catch((error) => toast(error.message, "danger"));
    }
    const shown = figures(breaker);
    byId("state").replaceChildren(badge(breaker.state));
    const {outage} = breaker;
    byId("summary").textContent = `for ${shown.since}: ${outage ? why(outage.reason, outage.actor) : shown.reason}`;
    for (const button of document.querySelectorAll(".breaker-verbs [data-verb]")) {
        button.hidden = !applies(button.dataset.verb, breaker);
    }
    byId("deferred").classList.toggle("refusing", !admits(breaker));
    choose("deferred");
    state(breaker, shown);
}

function state(breaker, shown) {
    const {outage} = breaker;
    const durations = past?.durations.runs ? past.durations : null;
    const basis = durations && `Of ${durations.runs.toLocaleString()} runs of its tasks that succeeded in the last 5 minutes, by their events`;
    const facts = [
        ["Since", breaker.epoch ? moment(outage?.opened ?? breaker.since) : NOTHING], ["Causes", causes(outage)],
        ...(outage && outage.reason !== breaker.reason ? [["Latest", shown.reason]] : []), ["Next probe", shown.probe], ["Deferred", shown.deferred],
        ["Oldest wait", shown.oldest], ["Recovery", shown.recovery], ["Evidence", shown.evidence],
        ["Calls per second", past ? perSecond(perSecondOf(past)) : NOTHING, "Over the last 5 minutes"],
        ["Duration, p50", durations ? short(durations.p50) : NOTHING, basis],
        ["Duration, p95", durations ? short(durations.p95) : NOTHING, basis],
        ["Calls", shown.calls, "In about the last window"], ["Failed", `${breaker.failures} · ${shown.failed}`],
        ["Slow", `${breaker.slow} · ${shown.slow}`], ["Openings in a row", breaker.openings],
        ["Trials in flight", breaker.trials],
    ].map(fact);
    const known = [...byId("facts").children];
    if (known.length !== facts.length) {
        byId("facts").replaceChildren(...facts);
        return;
    }
    facts.forEach((each, place) => { // what a person points at stays, if it is the same
        if (!known[place].isEqualNode(each)) {
            known[place].replaceWith(each);
        }
    });
}

function fact([term, value, title]) {
    const text = value instanceof Node ? value.textContent : String(value);
    const kinds = [text.length > 24 ? "wide" : "", /^(0 · )?(—|0|0%)$/.test(text) ? "nothing" : ""].join(" ");
    return el("div", {class: kinds, ...(title ? {title} : {})}, el("dt", {}, term), el("dd", {}, value instanceof Node ? value : text));
}

function causes(outage) {
    return outage?.causes.map(([cause, count]) => `${cause} ${count.toLocaleString()}`).join(", ") || NOTHING;
}

// --- the past ------------------------------------------------------------------------------------

async function remember() {
    past = await get(pageUrl(name, "history"));
    draw(byId("chart"), past);
    const entries = JSON.stringify(past.transitions);
    if (entries !== logged) { // else what a person has opened stays open
        logged = entries;
        byId("log").tBodies[0].replaceChildren(...past.transitions.map(logRow));
    }
    state(latest, figures(latest));
}

function logRow({at, previous, state: next, reason, actor, calls, failures, slow, would_open: wouldOpen}) {
    const change = previous === next ? [] : [badge(previous), " → "];
    return titled("log", el(
        "tr", {}, cell(moment(at)), el("td", {}, ...change, badge(next), wouldOpen ? " would open" : ""),
        cell(reason, "reason"), cell(actor), ...[calls, failures, slow].map(number),
        el("td", {class: "log-more"}, ...(calls + failures + slow ? [details()] : [])),
    ));
}

// Shows the figures of an entry where they are hidden for lack of room.
function details() {
    const button = el("button", {type: "button", class: "btn btn-link btn-sm p-0", "aria-expanded": "false"}, "Details");
    button.addEventListener("click", () => {
        button.setAttribute("aria-expanded", button.closest("tr").classList.toggle("more"));
    });
    return button;
}

// In narrow windows, where rows are cards, each cell says what it is.
function titled(id, row) {
    const heads = byId(id).querySelectorAll("thead th");
    [...row.cells].forEach((each, place) => each.setAttribute("data-title", heads[place].textContent.trim()));
    return row;
}

function cell(content, kind = "") {
    return el("td", {class: content === NOTHING || !content ? `${kind} nothing` : kind}, content || NOTHING);
}

function number(count) {
    return el("td", {class: count ? "text-end" : "text-end nothing"}, count.toLocaleString());
}

// --- tasks ---------------------------------------------------------------------------------------

const selected = {deferred: new Set(), dead: new Set()};
const found = {}; // the last answer of each kind

function taskRow(kind, task) {
    const id = task.task_id;
    const buttons = mayAct ? VERBS[kind].map((verb) => taskButton(kind, verb, id)) : [];
    return titled(kind, el(
        "tr", {"data-task": id}, el("td", {}, ...(mayAct ? [checkbox(kind, id)] : [])), cell(task.task, "name"),
        el("td", {class: "id"}, el("a", {href: taskUrl(id)}, id)), cell(task.reason, "reason"),
        cell(moment(kind === "dead" ? task.died_at : task.since)), number(task.attempts), cell(task.args, "args"),
        cell(task.kwargs, "args"), el("td", {class: "task-verbs"}, ...buttons),
    ));
}

function checkbox(kind, id) {
    const box = el("input", {type: "checkbox", class: "form-check-input", "aria-label": `Select ${id}`});
    box.addEventListener("change", () => {
        box.checked ? selected[kind].add(id) : selected[kind].delete(id);
        choose(kind);
    });
    return box;
}

function taskButton(kind, verb, id) {
    const style = verb === "drop" ? "btn-outline-danger" : "btn-outline-primary";
    const button = el("button", {type: "button", class: `btn ${style} btn-sm me-1`, "data-verb": verb}, capitalized(verb));
    button.addEventListener("click", () => carryOut(kind, verb, [id]));
    return button;
}

function named(kind, count) {
    return `${count.toLocaleString()} ${NOUNS[kind][count === 1 ? 0 : 1]}`;
}

// Do something to tasks, a part of them at a time, until all are done or an error is the broker's or the store's.
async function carryOut(kind, verb, ids) {
    const what = ids.length === 1 ? `${NOUNS[kind][0]} ${ids[0]}` : named(kind, ids.length);
    if (verb === "drop" && !await sure(`Drop ${what}?`, "What is dropped is gone for good and never runs.", `Drop ${what}`)) {
        return;
    }
    if (ids.length > 1 && verb !== "drop" && !await sure(
        `${capitalized(verb)} ${what}?`, "They go back to the queues that they came from, now and all at once.", `${capitalized(verb)} ${what}`,
    )) {
        return;
    }
    const progress = byId(kind).querySelector(".progress-text");
    const problems = [];
    let done = 0;
    for (let next = 0; next < ids.length && !problems.some(({ends}) => ends); next += AT_ONCE) {
        const some = ids.slice(next, next + AT_ONCE);
        progress.textContent = ids.length > AT_ONCE ? `${next.toLocaleString()} of ${ids.length.toLocaleString()}…` : "";
        try {
            done += (await post(name, [kind, verb], {id: some})).done.length;
        } catch (error) {
            problems.push({text: error.message, ends: error.status !== 404}); // 404: the others of them are done
        }
    }
    progress.textContent = "";
    if (done) {
        toast(`${done === 1 && ids.length === 1 ? what : named(kind, done)} ${PAST[verb]}`, "success");
    }
    if (problems.length) {
        toast(problems[0].text, "danger");
    } else if (done < ids.length) {
        toast(`${named(kind, ids.length - done)} could not be ${PAST[verb]}: no longer there`, "warning");
    }
    selected[kind].clear();
    await list(kind);
    refresh();
}

// Show what is selected, and let only that be done which applies.
function choose(kind) {
    const [section, count] = [byId(kind), selected[kind].size];
    for (const row of section.querySelectorAll("tbody tr")) {
        const box = row.querySelector("input");
        if (box) {
            box.checked = selected[kind].has(row.dataset.task);
        }
    }
    for (const button of section.querySelectorAll("[data-bulk]")) {
        const refused = button.dataset.bulk === "resume" && latest && !admits(latest);
        button.textContent = `${capitalized(button.dataset.bulk)} ${count ? named(kind, count) : "selected"}`;
        button.disabled = !count || refused;
        button.title = refused ? `${name} is ${latest.state}: its tasks would be deferred again` : "";
    }
    const all = section.querySelector(".all");
    const every = section.querySelector(".every");
    if (all && found[kind]) {
        const {tasks, ids, count: there} = found[kind];
        const more = ids ? ids.length : Math.min(there, SEARCHED);
        all.checked = tasks.length > 0 && tasks.every((task) => selected[kind].has(task.task_id));
        every.hidden = !all.checked || more <= count;
        every.textContent = `Select ${more < there && !ids ? "the oldest" : "all"} ${more.toLocaleString()}${ids ? " found" : ""}`;
    }
}

async function list(kind, {everything = false} = {}) {
    const section = byId(kind);
    const searched = section.querySelector("[type=search]").value;
    const query = searched || everything ? `?search=${encodeURIComponent(searched)}` : "";
    const counted = section.querySelector(".task-count");
    try {
        const answer = found[kind] = await get(pageUrl(name, kind) + query);
        const {count, tasks, ids} = answer;
        const shown = tasks.length < (ids ?? {length: count}).length ? `, the oldest ${tasks.length} shown` : "";
        counted.textContent = (ids && searched ? `${ids.length.toLocaleString()} of ${count.toLocaleString()} found` : count.toLocaleString()) + shown;
        section.querySelector("tbody").replaceChildren(...tasks.map((task) => taskRow(kind, task)));
        section.querySelector("table").hidden = tasks.length === 0;
        section.querySelector(".task-tools").hidden = count === 0;
        if (everything) {
            ids.forEach((id) => selected[kind].add(id));
        }
    } catch (error) {
        counted.textContent = error.message;
    }
    choose(kind);
}

for (const kind of Object.keys(VERBS)) {
    const section = byId(kind);
    section.querySelector(".reload").addEventListener("click", () => list(kind));
    section.querySelector("form").addEventListener("submit", (event) => {
        event.preventDefault();
        selected[kind].clear();
        list(kind);
    });
    for (const button of section.querySelectorAll("[data-bulk]")) {
        button.addEventListener("click", () => carryOut(kind, button.dataset.bulk, [...selected[kind]]));
    }
    section.querySelector(".all")?.addEventListener("change", ({target}) => {
        selected[kind] = new Set(target.checked ? found[kind].tasks.map((task) => task.task_id) : []);
        choose(kind);
    });
    section.querySelector(".every")?.addEventListener("click", () => list(kind, {everything: true}));
    list(kind);
}
for (const button of document.querySelectorAll(".breaker-verbs [data-verb]")) {
    button.addEventListener("click", () => ask(latest, button.dataset.verb, () => refresh()));
}
const refresh = live(page, pageUrl(name), show);
