// Elements of a page, and times. Text from outside goes into a page by textContent only.
export const NOTHING = "—";

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

// The one way in which times are written: local, and in UTC when pointed at.
export function moment(seconds) {
    if (!seconds) {
        return NOTHING;
    }
    const [at, pad] = [new Date(seconds * 1000), (number) => String(number).padStart(2, "0")];
    const date = [at.getFullYear(), pad(at.getMonth() + 1), pad(at.getDate())].join("-");
    const time = [at.getHours(), at.getMinutes(), at.getSeconds()].map(pad).join(":");
    const utc = at.toISOString();
    return el("time", {datetime: utc, title: `${utc.slice(0, 19).replace("T", " ")} UTC`}, `${date} ${time}`);
}
