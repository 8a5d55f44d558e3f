// One breaker, live; its tasks when asked for, because a look at them costs the broker something.
import {NOTHING, ask, badge, byId, el, figures, get, live, mayAct, moment, pageUrl, post, taskUrl, toast, why} from "./common.js";

import {draw} from "./chart.js";

const page = byId("breaker-page");
const name = page.dataset.name;
const VERBS = {deferred: ["resume", "drop"], dead: ["replay", "drop"]};

// --- figures -------------------------------------------------------------------------------------

let remembered = null; // epoch of the breaker, and ten seconds, that chart and log show

function show({breaker}) {
    if (!breaker) {
        return;
    }
    const present = `${breaker.epoch} ${Math.floor(breaker.now / 10)}`;
    if (present !== remembered) {
        remembered = present;
        remember().catch((error) => toast(error.message, "danger"));
    }
    const shown = figures(breaker);
    byId("state").replaceChildren(badge(breaker.state));
    const {outage} = breaker;
    byId("story").textContent = `for ${shown.since}: ${outage ? why(outage.reason, outage.actor) : shown.reason}`;
    byId("facts").replaceChildren(...[
        ["Since", breaker.epoch ? moment(outage?.opened ?? breaker.since) : NOTHING], ["Deferred", shown.deferred],
        ["Oldest wait", shown.oldest], ["Recovery", shown.recovery], ["Next probe", shown.probe],
        ["Latest", shown.reason], ["Causes", causes(outage)], ["Openings in a row", breaker.openings],
        ["Evidence", shown.evidence], ["Calls", shown.calls], ["Failed", `${breaker.failures} · ${shown.failed}`],
        ["Slow", `${breaker.slow} · ${shown.slow}`], ["Trials in flight", breaker.trials],
    ].map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, String(value)))));
}

function causes(outage) {
    return outage?.causes.map(([cause, count]) => `${cause} ${count.toLocaleString()}`).join(", ") || NOTHING;
}

// --- the past ------------------------------------------------------------------------------------

async function remember() {
    const past = await get(pageUrl(name, "history"));
    draw(byId("chart"), past);
    byId("log").tBodies[0].replaceChildren(...past.transitions.map(logRow));
}

function logRow({at, previous, state, reason, actor, calls, failures, slow, would_open: wouldOpen}) {
    const change = previous === state ? [] : [badge(previous), " → "];
    return el(
        "tr", {}, cell(moment(at)), el("td", {}, ...change, badge(state), wouldOpen ? " would open" : ""), cell(reason),
        cell(actor), ...[calls, failures, slow].map((count) => el("td", {class: "text-end"}, count.toLocaleString())),
    );
}

// --- tasks ---------------------------------------------------------------------------------------

function cell(text) {
    return el("td", {title: text}, text || NOTHING);
}

function taskRow(kind, task) {
    const buttons = mayAct ? VERBS[kind].map((verb) => taskButton(kind, verb, task.task_id)) : [];
    return el(
        "tr", {"data-task": task.task_id}, el("td", {}, ...buttons), cell(task.task),
        el("td", {}, el("a", {href: taskUrl(task.task_id)}, task.task_id)), cell(task.args), cell(task.kwargs),
        cell(moment(task.since)), el("td", {class: "text-end"}, String(task.attempts)), cell(task.reason),
    );
}

function taskButton(kind, verb, id) {
    const button = el("button", {type: "button", class: "btn btn-outline-primary btn-sm me-1", "data-verb": verb}, verb);
    button.addEventListener("click", async () => {
        if (verb === "drop" && !window.confirm(`Drop ${id}, never to run?`)) {
            return;
        }
        try {
            await post(name, [kind, verb], {id});
            toast(`${id}: ${verb} done`, "success");
        } catch (error) {
            toast(error.message, "danger");
        }
        await list(kind);
        refresh();
    });
    return button;
}

async function list(kind) {
    const section = byId(kind);
    try {
        const {count, tasks} = await get(pageUrl(name, kind));
        const more = tasks.length < count ? `${tasks.length} of ${count}` : `${count}`;
        section.querySelector(".task-count").textContent = more;
        section.querySelector("tbody").replaceChildren(...tasks.map((task) => taskRow(kind, task)));
        section.querySelector("table").hidden = tasks.length === 0;
    } catch (error) {
        section.querySelector(".task-count").textContent = error.message;
    }
}

for (const kind of Object.keys(VERBS)) {
    byId(kind).querySelector(".reload").addEventListener("click", () => list(kind));
    list(kind);
}
for (const button of document.querySelectorAll(".breaker-verbs [data-verb]")) {
    button.addEventListener("click", () => ask(name, button.dataset.verb, () => refresh()));
}
const refresh = live(page, pageUrl(name), show);
