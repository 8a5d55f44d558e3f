// What both pages share: elements, words for figures, requests, the dialog of an operator's verb.
// Text from outside goes into the page by textContent only.

const BADGES = {
    CLOSED: "text-bg-success",
    OPEN: "text-bg-danger",
    FORCED_OPEN: "text-bg-danger",
    HALF_OPEN: "text-bg-warning",
    SHADOW: "text-bg-info",
    DISABLED: "text-bg-secondary",
};
// What a person should see first has the lowest number.
const URGENCY = {OPEN: 0, FORCED_OPEN: 0, HALF_OPEN: 1, DISABLED: 2, SHADOW: 2, CLOSED: 3};
const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
const OLD_AFTER = 5; // seconds

export const NOTHING = "—";

// --- elements ------------------------------------------------------------------------------------

export function byId(id) {
    return document.getElementById(id);
}

export function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
}

export function badge(state) {
    return el("span", {class: `badge ${BADGES[state] ?? "text-bg-secondary"}`}, state);
}

export function urgency(state) {
    return URGENCY[state] ?? 0;
}

export function toast(message, type) {
    const close = {type: "button", class: "btn-close btn-close-white me-2 m-auto", "data-bs-dismiss": "toast"};
    const element = el(
        "div", {class: `toast text-bg-${type} border-0`, role: type === "danger" ? "alert" : "status"},
        el("div", {class: "d-flex"}, el("div", {class: "toast-body"}, message),
            el("button", {...close, "aria-label": "Close"})),
    );
    byId("toast-container").append(element);
    element.addEventListener("hidden.bs.toast", () => element.remove());
    window.bootstrap.Toast.getOrCreateInstance(element, {delay: type === "danger" ? 10000 : 5000}).show();
}

// --- figures -------------------------------------------------------------------------------------

export function duration(seconds) {
    if (seconds === null || seconds === undefined) {
        return NOTHING;
    }
    let left = Math.max(0, Math.round(seconds));
    const parts = [];
    for (const [unit, size] of UNITS) {
        const count = Math.floor(left / size);
        left -= count * size;
        if (count) {
            parts.push(`${count} ${unit}`);
        }
    }
    return parts.slice(0, 2).join(" ") || "0 s";
}

export function moment(seconds) {
    return seconds ? new Date(seconds * 1000).toLocaleString() : NOTHING;
}

export function share(rate, calls) {
    return calls ? `${Math.round(rate * 100)}%` : NOTHING;
}

// How near a breaker is to opening, by failures or by slow calls.
export function evidence({evidence: failures, slow_evidence: slow, minimum_calls: needed}) {
    const score = Math.round(Math.max(failures, slow) * needed * 10) / 10;
    return score ? `${score} of ${needed}` : NOTHING;
}

export function figures(breaker) {
    const {now, since, epoch, outage, oldest_deferred_at: oldest, next_probe_at: probe, reason, actor} = breaker;
    return {
        evidence: evidence(breaker),
        failed: share(breaker.failure_rate, breaker.calls),
        slow: share(breaker.slow_rate, breaker.calls),
        calls: breaker.calls.toLocaleString(),
        deferred: breaker.deferred.toLocaleString(),
        oldest: duration(oldest === null ? null : now - oldest),
        since: epoch ? duration(now - (outage?.opened ?? since)) : NOTHING,
        reason: why(reason, actor),
        recovery: recovery(breaker.estimate),
        probe: probe === null ? NOTHING : `in ${duration(probe - now)}`,
    };
}

export function why(reason, actor) {
    return (reason || actor) ? reason + (actor ? ` (${actor})` : "") : NOTHING;
}

// When the waiting tasks will be done, as far as is known.
function recovery(estimate) {
    if (!estimate) {
        return NOTHING;
    }
    const late = estimate.late ? `; ${estimate.late.toLocaleString()} late` : "";
    return estimate.done_in === null ? "unknown" : `in about ${duration(estimate.done_in)}${late}`;
}

// --- requests ------------------------------------------------------------------------------------

const prefix = byId("url_prefix").value.replace(/^\/+|\/+$/g, "");
const root = prefix ? `/${prefix}` : "";

export function pageUrl(name, ...rest) {
    return [`${root}/breakers`, ...[name, ...rest].filter(Boolean).map(encodeURIComponent)].join("/");
}

export function taskUrl(id) {
    return `${root}/task/${encodeURIComponent(id)}`;
}

async function answerOf(response) {
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) {
        throw new Error(answer.error || `${response.status} ${response.statusText}`);
    }
    return answer;
}

export async function get(url) {
    return answerOf(await fetch(url, {headers: {Accept: "application/json"}}));
}

export async function post(name, path, words) {
    const token = document.cookie.match(/(?:^|;\s*)_xsrf=([^;]+)/);
    const headers = {"Content-Type": "application/json", "X-XSRFToken": token ? decodeURIComponent(token[1]) : ""};
    const url = [`${root}/api/breakers/${encodeURIComponent(name)}`, ...path].join("/");
    return answerOf(await fetch(url, {method: "POST", headers, body: JSON.stringify(words)}));
}

// --- live ----------------------------------------------------------------------------------------

// Shows how new the data is, again and again; `show` gets what the page's own address answers as JSON.
export function live(page, url, show) {
    const refresh = async () => {
        try {
            const data = await get(`${url}?json=1`);
            tellAge(data);
            show(data);
        } catch (error) {
            tellAge({problem: `Flower does not answer: ${error.message}`, age: null});
        }
    };
    const again = async () => {
        if (!document.hidden) {
            await refresh();
        }
        if (page.dataset.refresh === "1") {
            window.setTimeout(again, 2000);
        }
    };
    again();
    return refresh;
}

function tellAge({age, read_at: readAt, problem}) {
    const old = problem || age === null || age > OLD_AFTER;
    const seen = readAt ? `seen at ${new Date(readAt * 1000).toLocaleTimeString()}, ${duration(age)} ago` : "never seen";
    byId("old-data").classList.toggle("d-none", !old);
    byId("old-data").textContent = old ? `This is old: ${seen}. ${problem}` : "";
    byId("live-dot").className = `status-dot ${old ? "status-dot-error" : "status-dot-live"}`;
    byId("live-status").textContent = old ? "Old" : "Live";
}

// --- an operator's verb ----------------------------------------------------------------------------

const dialog = byId("act");
const verb = byId("act-verb");
let acting = null; // name of the breaker that the dialog is about
let afterwards = () => {};

export const mayAct = dialog.dataset.allowed === "1";

export function ask(name, chosen, then) {
    acting = name;
    afterwards = then;
    verb.value = chosen ?? "isolate";
    byId("act-title").textContent = name;
    byId("act-reason").value = byId("act-rate").value = "";
    explain();
    window.bootstrap.Modal.getOrCreateInstance(dialog).show();
}

function explain() {
    const resumes = verb.value === "resume";
    byId("act-hint").textContent = verb.selectedOptions[0].dataset.hint;
    byId("act-with-rate").classList.toggle("d-none", !resumes);
    byId("act-with-reason").classList.toggle("d-none", resumes);
}

async function act(event) {
    event.preventDefault();
    const [name, chosen] = [acting, verb.value];
    window.bootstrap.Modal.getOrCreateInstance(dialog).hide();
    try {
        const words = chosen === "resume" ? {rate: byId("act-rate").value} : {reason: byId("act-reason").value};
        toast(summary(name, await post(name, [chosen], words)), "success");
    } catch (error) {
        toast(error.message, "danger");
    }
    afterwards();
}

function summary(name, {breaker, resumed}) {
    if (breaker) {
        return `${name} is ${breaker.state}`;
    }
    return resumed === null ? `${name}: resuming goes on` : `${name}: ${resumed} resumed`;
}

verb.addEventListener("change", explain);
dialog.querySelector("form").addEventListener("submit", act);
dialog.addEventListener("shown.bs.modal", () => byId(verb.value === "resume" ? "act-rate" : "act-reason").focus());
