// The last hour of a breaker: calls by outcome, minute by minute, before bands of its state. SVG, made by hand.
const SVG = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, TOP, BOTTOM] = [240, 48, 20, 24];
const FLOOR = HEIGHT - BOTTOM;
const MINUTE = 60;
const [SHORTEST, LONGEST] = [10, 60]; // minutes that are shown
const RECENT = 5; // minutes of which the calls per second are shown
const LABEL = 70; // pixels between two labels of the time
const KINDS = ["SUCCESS", "SLOW", "FAILURE", "refused"];

function shape(tag, attributes, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) {
        element.setAttribute(name, value);
    }
    if (text !== undefined) {
        element.textContent = text;
    }
    return element;
}

function box(x, y, width, height, kind, title) {
    const element = shape("rect", {x, y, width, height, class: kind});
    element.append(shape("title", {}, title));
    return element;
}

function clock(seconds) {
    return new Date(seconds * 1000).toLocaleTimeString([], {hour: "2-digit", minute: "2-digit", hourCycle: "h23"});
}

// The next of 1, 2, 5, 10, 20, 50, ... that is not below a number.
function roundUp(number) {
    const power = 10 ** Math.floor(Math.log10(Math.max(1, number)));
    return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= number);
}

// Spans of time in one state, made of a log whose newest entry comes first.
export function spans(transitions, state, from, to) {
    const changes = transitions.filter((each) => each.state !== each.previous).sort((one, other) => one.at - other.at);
    const found = [];
    let [began, current] = [from, changes.length ? changes[0].previous : state];
    for (const {at, state: next} of changes) {
        if (at > from) {
            found.push({state: current, from: began, to: Math.min(at, to)});
            began = at;
        }
        current = next;
    }
    return [...found, {state: current, from: began, to}].filter((span) => span.to > span.from);
}

// The minute in which what is known of a breaker begins, not more than so many minutes ago.
function beginning({minutes, transitions, now}, most) {
    const known = Math.min(now, ...minutes.map(({at}) => at), ...transitions.map(({at}) => at));
    return Math.max(Math.floor(known / MINUTE), Math.floor(now / MINUTE) + 1 - most) * MINUTE;
}

// Calls per second over the last minutes; null before there was any.
export function perSecondOf(past) {
    const from = beginning(past, RECENT);
    const calls = past.minutes.filter(({at}) => at >= from)
        .reduce((sum, {SUCCESS = 0, SLOW = 0, FAILURE = 0}) => sum + SUCCESS + SLOW + FAILURE, 0);
    return past.minutes.length ? calls / Math.max(past.now - from, 1) : null;
}

export function draw(svg, past) {
    const {minutes, transitions, state, now} = past;
    const from = beginning(past, LONGEST);
    const to = Math.max((Math.floor(now / MINUTE) + 1) * MINUTE, from + SHORTEST * MINUTE);
    const most = roundUp(Math.max(...minutes.map((each) => KINDS.reduce((sum, kind) => sum + (each[kind] ?? 0), 0)), 1));
    const width = Math.max(320, svg.clientWidth); // one unit is one pixel, or letters would shrink in narrow windows
    const right = width - 8;
    const x = (seconds) => LEFT + (right - LEFT) * (seconds - from) / (to - from);
    const y = (calls) => FLOOR - (FLOOR - TOP) * calls / most;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.replaceChildren(
        ...spans(transitions, state, from, now).flatMap((span) => band(span, x)), ...axes(from, to, most, x, y),
        ...minutes.filter(({at}) => at >= from).flatMap((minute) => bars(minute, x, y)),
    );
}

// A pale band behind the bars, and a strip above them, where no bar hides it.
function band(span, x) {
    const title = `${span.state} from ${clock(span.from)} to ${clock(span.to)}`;
    const [left, width] = [x(span.from), x(span.to) - x(span.from)];
    return [
        box(left, TOP, width, FLOOR - TOP, `band band-${span.state}`, title),
        box(left, TOP - 12, width, 8, `band-${span.state}`, title),
    ];
}

function axes(from, to, most, x, y) {
    const shapes = [];
    for (const calls of [0, most / 2, most].filter(Number.isInteger)) {
        shapes.push(shape("line", {x1: LEFT, x2: x(to), y1: y(calls), y2: y(calls), class: "grid"}));
        shapes.push(shape("text", {x: LEFT - 6, y: y(calls) + 4, "text-anchor": "end"}, calls.toLocaleString()));
    }
    const tick = MINUTE * [1, 2, 5, 10, 20].find((minutes) => x(from + minutes * MINUTE) - x(from) >= LABEL);
    for (let at = Math.ceil(from / tick) * tick; at < to; at += tick) {
        shapes.push(shape("text", {x: x(at), y: HEIGHT - 6, "text-anchor": "middle"}, clock(at)));
    }
    return shapes;
}

function bars(minute, x, y) {
    let below = 0;
    return KINDS.filter((kind) => minute[kind]).map((kind) => {
        const top = below + minute[kind];
        const title = `${clock(minute.at)}  ${kind} ${minute[kind].toLocaleString()}`;
        const bar = box(
            x(minute.at) + 1, y(top), x(minute.at + MINUTE) - x(minute.at) - 2, y(below) - y(top), `bar-${kind}`, title,
        );
        below = top;
        return bar;
    });
}
