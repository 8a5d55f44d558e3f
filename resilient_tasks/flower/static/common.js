// What both pages share: elements, texts for figures, requests, the dialog of an operator's verb.
import {NOTHING, byId, el, moment} from "./elements.js";

export * from "./elements.js";

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

// --- elements ------------------------------------------------------------------------------------

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

export function perSecond(rate) {
    return rate === null ? NOTHING : `${rate.toLocaleString([], {maximumSignificantDigits: rate < 100 ? 2 : 4})}/s`;
}

export function short(seconds) {
    const digits = {maximumSignificantDigits: 2};
    return seconds < 1 ? `${(seconds * 1000).toLocaleString([], digits)} ms` : `${seconds.toLocaleString([], digits)} s`;
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
    const {now, oldest_deferred_at: oldest, next_probe_at: probe, reason, actor} = breaker;
    return {
        evidence: evidence(breaker),
        failed: share(breaker.failure_rate, breaker.calls),
        slow: share(breaker.slow_rate, breaker.calls),
        calls: breaker.calls.toLocaleString(),
        deferred: breaker.deferred.toLocaleString(),
        oldest: duration(oldest === null ? null : wait(breaker)),
        since: duration(age(breaker)),
        reason: why(reason, actor),
        recovery: recovery(breaker.estimate),
        probe: probe === null ? NOTHING : `in ${duration(probe - now)}`,
    };
}

export function why(reason, actor) {
    return (reason || actor) ? reason + (actor ? ` (${actor})` : "") : NOTHING;
}

// Seconds for which the first task has waited; 0 if none waits.
export function wait({now, oldest_deferred_at: oldest}) {
    return oldest === null ? 0 : now - oldest;
}

// Seconds since its state, or the outage under way, began.
export function age({now, since, epoch, outage}) {
    return epoch ? now - (outage?.opened ?? since) : null;
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

export const deadLettersUrl = `${root}/dead-letters`;

export function taskUrl(id) {
    return `${root}/task/${encodeURIComponent(id)}`;
}

async function answerOf(response) {
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) {
        const error = new Error(answer.error || `${response.status} ${response.statusText}`);
        throw Object.assign(error, {status: response.status});
    }
    return answer;
}

export async function get(url) {
    return answerOf(await fetch(url, {headers: {Accept: "application/json"}}));
}

export async function post(name, path, fields) {
    const token = document.cookie.match(/(?:^|;\s*)_xsrf=([^;]+)/);
    const headers = {"Content-Type": "application/json", "X-XSRFToken": token ? decodeURIComponent(token[1]) : ""};
    const url = [`${root}/api/breakers/${encodeURIComponent(name)}`, ...path].join("/");
    return answerOf(await fetch(url, {method: "POST", headers, body: JSON.stringify(fields)}));
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
    const seen = readAt ? ["seen at ", moment(readAt), `, ${duration(age)} ago`] : ["never seen"];
    byId("old-data").classList.toggle("d-none", !old);
    byId("old-data").replaceChildren(...(old ? ["This is old: ", ...seen, `. ${problem}`] : []));
    byId("live-dot").className = `status-dot ${old ? "status-dot-error" : "status-dot-live"}`;
    byId("live-status").textContent = old ? "Old" : "Live";
}

// --- an operator's verb ----------------------------------------------------------------------------

const ADMITTING = ["CLOSED", "DISABLED", "SHADOW"];
const TARGETS = {trip: "OPEN", isolate: "FORCED_OPEN", disable: "DISABLED", shadow: "SHADOW", reset: "CLOSED"};
const dialog = byId("act");
const verb = byId("act-verb");
let acting = null; // name of the breaker that the dialog is about
let afterwards = () => {};

export const mayAct = dialog.dataset.allowed === "1";

export function admits({state}) {
    return ADMITTING.includes(state);
}

// Whether a verb would change anything.
export function applies(each, breaker) {
    if (each === "resume") {
        return breaker.deferred > 0 && admits(breaker);
    }
    const {evidence: failures, slow_evidence: slow, openings, ramp_since: ramp} = breaker;
    return TARGETS[each] !== breaker.state || (each === "reset" && Boolean(failures || slow || openings || ramp));
}

export function ask(breaker, chosen, then) {
    acting = breaker.name;
    afterwards = then;
    for (const option of verb.options) {
        option.hidden = option.disabled = !applies(option.value, breaker);
    }
    verb.value = chosen ?? (breaker.state === "FORCED_OPEN" ? "reset" : "isolate");
    byId("act-title").textContent = breaker.name;
    byId("act-reason").value = byId("act-rate").value = "";
    explain();
    window.bootstrap.Modal.getOrCreateInstance(dialog).show();
}

function explain() {
    const resumes = verb.value === "resume";
    byId("act-hint").textContent = verb.selectedOptions[0].dataset.hint;
    byId("act-go").textContent = resumes ? `Resume tasks of ${acting}` : `${capitalized(verb.value)} ${acting}`;
    byId("act-with-rate").classList.toggle("d-none", !resumes);
    byId("act-with-reason").classList.toggle("d-none", resumes);
}

export function capitalized(text) {
    return text[0].toUpperCase() + text.slice(1);
}

async function act(event) {
    event.preventDefault();
    const [name, chosen] = [acting, verb.value];
    window.bootstrap.Modal.getOrCreateInstance(dialog).hide();
    try {
        const fields = chosen === "resume" ? {rate: byId("act-rate").value} : {reason: byId("act-reason").value};
        toast(summary(name, await post(name, [chosen], fields)), "success");
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

// Ask once more before something is done; the button says what.
export function sure(title, text, button) {
    const asked = byId("sure");
    const modal = window.bootstrap.Modal.getOrCreateInstance(asked);
    byId("sure-title").textContent = title;
    byId("sure-text").textContent = text;
    byId("sure-go").textContent = button;
    return new Promise((resolve) => {
        byId("sure-go").onclick = () => {
            resolve(true);
            modal.hide();
        };
        asked.addEventListener("hidden.bs.modal", () => resolve(false), {once: true});
        asked.addEventListener("shown.bs.modal", () => byId("sure-go").focus(), {once: true});
        modal.show();
    });
}
