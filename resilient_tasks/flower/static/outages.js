// Times as on the other pages; figures are there at once where there is room for them.
import {moment} from "./elements.js";

const TIME = /(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d)/;

for (const value of document.querySelectorAll("#outages-page dd")) {
    const parts = value.textContent.split(TIME);
    value.replaceChildren(...parts.map((part) => (TIME.test(part) ? moment(Date.parse(part) / 1000) : part)));
}
for (const details of document.querySelectorAll("#outages-page details")) {
    details.open = window.matchMedia("(min-width: 768px)").matches;
}
