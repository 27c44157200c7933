"use strict";
// Sorts tables, and shows what a head attends to. Pictures are bokeh's, patterns CircuitsVis'.
const held = (id) => JSON.parse(document.getElementById(id).textContent);

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.sort !== undefined) sortBy(button);
  const place = button.closest(".attention");
  if (place && button.dataset.head) showHead(place.dataset.task, button.dataset.head.split("."));
  if (place && button.dataset.example) showExample(place, Number(button.dataset.example));
});

function sortBy(button) {
  const head = button.closest("th");
  const body = head.closest("table").tBodies[0];
  const column = Number(button.dataset.sort);
  const numbers = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
  // Numbers begin with the largest, words with A.
  const rising = (head.getAttribute("aria-sort") || (numbers ? "ascending" : "descending")) === "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const sign = rising ? 1 : -1;
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const text = cell.textContent;
    return { row, text, number: cell.dataset.value === undefined ? NaN : Number(cell.dataset.value) };
  });
  rows.sort((a, b) => {
    if (!a.text || !b.text) return (a.text ? 0 : 1) - (b.text ? 0 : 1);
    if (isNaN(a.number) || isNaN(b.number)) return sign * a.text.localeCompare(b.text, undefined, { numeric: true });
    return sign * (a.number - b.number);
  });
  body.append(...rows.map((each) => each.row));
}

let drawn = 0;

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function showHead(task, head) {
  const place = [...document.querySelectorAll(".attention")].find((each) => each.dataset.task === task);
  const shown = place && place.querySelector(".shown");
  if (!shown) return;
  place.dataset.shown = head.join(".");
  for (const button of place.querySelectorAll("[data-head]")) {
    button.setAttribute("aria-pressed", String(button.dataset.head === place.dataset.shown));
  }
  showExample(place, Number(place.dataset.example || 0));
}

function showExample(place, number) {
  const examples = held("examples")[place.dataset.task] || [];
  const name = place.dataset.shown;
  const [layer, head] = name.split(".");
  const shown = place.querySelector(".shown");
  place.dataset.example = number;
  shown.replaceChildren(element("h4", `Layer ${layer}, head ${head}`));
  const said = (held("told")[place.dataset.task] || {})[name];
  if (said) shown.append(element("p", said));
  const example = examples[number];
  const seen = example && example.heads[name];
  if (!example) return;
  if (!seen) {
    shown.append(element("p", "No pattern of this head is stored: only those of the best heads by each score are, which the buttons name."));
    return;
  }
  const choices = element("div", undefined, "choices");
  choices.setAttribute("role", "group");
  choices.setAttribute("aria-label", "Example prompts");
  examples.forEach((_, i) => {
    const button = element("button", `prompt ${i + 1}`);
    button.type = "button";
    button.dataset.example = i;
    button.setAttribute("aria-pressed", String(i === number));
    choices.append(button);
  });
  const weights = unfolded(seen.pattern, example.tokens.length);
  const last = example.tokens.length - 1;
  const strongest = weights[last].map((weight, at) => [weight, at]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  const list = strongest.filter(([weight]) => weight > 0.005).map(([weight, at]) => `“${visible(example.tokens[at]).trim()}” (${at}) ${weight.toFixed(2)}`);
  shown.append(
    choices,
    element("p", example.tokens.map(visible).join(""), "prompt"),
    element("p", seen.direct === null
      ? `Its direct effect on the answer “${example.answer}” is not known: this model does not tell what its parts add.`
      : `Its direct effect on ${example.unit}, “${example.answer}”: ${seen.direct.toFixed(3)}.`),
    element("p", `From the last token it attends most to ${list.join(", ")}.`),
  );
  const pattern = element("div", undefined, "pattern");
  pattern.id = `pattern-${drawn += 1}`;
  shown.append(pattern);
  CircuitsVis.render(pattern.id, CircuitsVis.AttentionPattern, {
    attention: weights,
    tokens: example.tokens.map(visible),
    maxValue: 1,
    minValue: -1,
    positiveColor: "#0072B2",
    showAxisLabels: true,
    zoomed: false,
    maskUpperTri: true,
  });
}

const visible = (token) => token.replace(/\n/g, "↵");

// The lower triangle, row by row, a byte a weight, in 255ths.
function unfolded(text, n) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  let at = 0;
  return Array.from({ length: n }, (_, row) =>
    Array.from({ length: n }, (_, column) => (column > row ? 0 : Math.round((1000 * bytes[at++]) / 255) / 1000)));
}

Bokeh.embed.embed_items({ report: held("pictures") }, held("places"));
