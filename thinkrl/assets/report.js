
"use strict";
// What the page does when it is used. Without it, everything but the completions is there.
// Model text only ever becomes text nodes: `make` appends strings, and nothing here parses HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SHARES = new Set(DATA.shares);
const SVG = new Set("svg g line polyline circle rect text".split(" "));

function make(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null));
  return node;
}

function number(value, key = "", sign = false) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  let text;
  if (SHARES.has(key)) text = (100 * value).toFixed(1) + " %";
  else if (Math.abs(value) >= 999.5) text = Math.round(value).toLocaleString("en-US");
  else text = key === "tokens" ? value.toFixed(1) : String(Number(value.toPrecision(3)));
  return (sign && value >= 0 ? "+" : "") + text.replaceAll("-", "−");
}

function fixed(value, sign = false) {
  if (value === null) return "–";
  const text = value.toFixed(Math.abs(value) < 10 ? 3 : 1).replace("-", "−");
  return Number(value.toFixed(3)) === 0 ? "0" : (sign && value > 0 ? "+" : "") + text;
}
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const plural = (n, word) => `${n.toLocaleString("en-US")} ${word}${n === 1 ? "" : "s"}`;
const runName = i => DATA.runs[i];

// ---- the address keeps what is chosen, so that a reload or a copied link shows the same

const STATE = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
function remember(name, value) {
  if (value === "" || value === null) STATE.delete(name); else STATE.set(name, value);
  history.replaceState(null, "", "#" + STATE);
}

// ---- sections: where one is, and going there without losing the state

function sections() {
  const links = [...document.querySelectorAll("nav a")];
  const targets = links.map(link => document.querySelector(link.getAttribute("href")));
  const mark = () => {
    const passed = targets.filter(target => target.getBoundingClientRect().top < innerHeight * 0.35);
    links.forEach((link, i) => {
      if (targets[i] === passed.at(-1)) {
        if (!link.hasAttribute("aria-current")) link.parentNode.scrollLeft = link.offsetLeft - 60;
        link.setAttribute("aria-current", "true");
      } else link.removeAttribute("aria-current");
    });
  };
  links.forEach((link, i) => link.addEventListener("click", event => {
    event.preventDefault();
    targets[i].scrollIntoView();
  }));
  addEventListener("scroll", mark, { passive: true });
  mark();
}

function reloading() {
  const box = document.querySelector("[name=reload]");
  if (!box) return;
  box.checked = STATE.get("reload") === "1";
  box.addEventListener("change", () => remember("reload", box.checked ? "1" : ""));
  setInterval(() => { if (box.checked && !document.hidden) location.reload(); }, 30000);
}

function choosingRuns() {
  for (const box of document.querySelectorAll("#runs input"))
    box.addEventListener("change", () => {
      for (const node of document.querySelectorAll(`.run-${box.value % 8}`))
        if (!node.closest("#runs")) node.style.display = box.checked ? "" : "none";
    });
}

// ---- curves: the values at one step, in every chart

function curves() {
  const slider = document.getElementById("at"), said = document.getElementById("at-step");
  if (!slider) return;
  const LEFT = 4, WIDTH = 320 - 42 - LEFT, TOP = 8, HEIGHT = 132 - TOP - 18, last = Number(slider.max);
  const charts = [...document.querySelectorAll("svg.curve")].map(svg => {
    const lines = DATA.curves[svg.dataset.key], outputs = [...svg.parentNode.querySelectorAll("output")];
    const dots = lines.map((_, i) => svg.appendChild(make("circle", { class: `dot run-${i % 8}`, r: 3, visibility: "hidden" })));
    return { svg, lines, outputs, dots, rest: outputs.map(o => o.textContent) };
  });

  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] <= step) low = middle; else high = middle; }
    return step - steps[low] < steps[high] - step ? low : high;
  }
  function show(step) {
    said.textContent = "step " + number(step);
    for (const { svg, lines, outputs, dots } of charts) {
      const y0 = Number(svg.dataset.y0), y1 = Number(svg.dataset.y1), x = LEFT + WIDTH * step / (last || 1);
      svg.classList.add("reading");
      for (const end of ["x1", "x2"]) svg.querySelector(".cursor").setAttribute(end, x);
      lines.forEach(([steps, values] = [[], []], i) => {
        if (!steps || !steps.length) return;
        const at = nearest(steps, step);
        outputs[i].textContent = number(values[at], svg.dataset.key);
        dots[i].setAttribute("cx", LEFT + WIDTH * steps[at] / (last || 1));
        dots[i].setAttribute("cy", TOP + HEIGHT * (y1 - values[at]) / (y1 - y0));
        dots[i].setAttribute("visibility", "visible");
      });
    }
  }
  function rest() {
    said.textContent = "the end, as means";
    slider.value = slider.max;
    for (const { svg, outputs, dots, rest } of charts) {
      svg.classList.remove("reading");
      outputs.forEach((output, i) => { output.textContent = rest[i]; });
      dots.forEach(dot => dot.setAttribute("visibility", "hidden"));
    }
  }
  slider.addEventListener("input", () => show(Number(slider.value)));
  slider.addEventListener("keydown", event => { if (event.key === "Escape") rest(); });
  for (const { svg } of charts) {
    const follow = event => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * 320 - LEFT) / WIDTH;
      const step = Math.round(Math.min(1, Math.max(0, share)) * last);
      slider.value = step;
      show(step);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") rest(); });
  }
}

// ---- a browser: a map of all items, filters, one item at a time, next and previous by keyboard

const BROWSERS = [];

// filters: [{ name, label, of: item -> value, range: true for numbers, options: values in order, say: value -> text, first: value chosen at first }]
function browser(id, items, filters, detail, keyOf, legend) {
  const box = document.querySelector(`[data-browser=${id}]`);
  if (!box || !items.length) return;
  const controls = make("div", { class: "controls" }), chosen = {};
  let shown = items, current = null;

  for (const filter of filters) {
    const values = [...new Set(items.map(filter.of))];
    if (values.length < 2) continue;
    const saved = STATE.get(`${id}.${filter.name}`) || "";
    if (filter.range) {
      const low = Math.min(...values), high = Math.max(...values), [from, to] = saved.split("-");
      const input = (which, value) => make("input", { type: "number", min: low, max: high, placeholder: which === "least" ? low : high,
        value: value || "", "aria-label": `${filter.label}, ${which}` });
      const pair = [input("least", from), input("most", to)];
      const read = () => {
        const [a, b] = pair.map(field => field.value);
        remember(`${id}.${filter.name}`, a || b ? `${a}-${b}` : "");
        chosen[filter.name] = item => (a === "" || filter.of(item) >= Number(a)) && (b === "" || filter.of(item) <= Number(b));
      };
      pair.forEach(field => field.addEventListener("input", () => { read(); update(); }));
      read();
      controls.append(make("fieldset", {}, make("legend", {}, filter.label), make("span", {}, pair[0], "–", pair[1])));
    } else {
      const options = (filter.options || values.sort()).filter(value => values.includes(value));
      const select = make("select", {}, make("option", { value: "" }, "all"),
        ...options.map((value, i) => make("option", { value: String(i) }, filter.say ? filter.say(value) : String(value || "none"))));
      const at = options.findIndex(value => String(value) === (saved || String(filter.first)));
      select.value = at < 0 || saved === "all" ? "" : String(at);
      const read = () => {
        const value = options[select.value], word = select.value === "" ? "all" : String(value);
        remember(`${id}.${filter.name}`, word === String(filter.first || "all") ? "" : word);
        chosen[filter.name] = item => select.value === "" || filter.of(item) === value;
      };
      select.addEventListener("change", () => { read(); update(); });
      read();
      controls.append(make("label", {}, filter.label, select));
    }
  }

  // The map: marks from left to right, in lines of at most 160 columns; a column is a group or a problem.
  const rows = 1 + Math.max(...items.flatMap(item => item.marksOf.map(mark => mark.row)));
  const columns = 1 + Math.max(...items.map(item => item.column)), across = Math.min(columns, 160), lines = Math.ceil(columns / across);
  const W = 7, H = 7, LINE = (rows + 0.6) * H, place = item => [item.column % across * W, Math.floor(item.column / across) * LINE];
  const map = make("svg", { class: "map", viewBox: `0 0 ${across * W} ${lines * LINE}`, preserveAspectRatio: "none", role: "img",
    width: across * Math.min(16, Math.max(W, 1136 / across)), height: lines * LINE * Math.max(0.6, Math.min(1.15, 90 / (lines * LINE))), "aria-label": legend });
  items.forEach(item => {
    const [x, y] = place(item);
    item.marks = item.marksOf.map(({ right, row }) => map.appendChild(make("rect", { class: right ? "right" : "wrong",
      x: x + 0.5, y: y + row * H + (right ? 0.5 : 2), width: W - 1, height: right ? H - 1 : H - 4 })));
  });
  const here = map.appendChild(make("rect", { class: "here", width: W, height: H * items[0].marksOf.length }));
  map.addEventListener("click", event => {
    const box = map.getBoundingClientRect(), top = (event.clientY - box.top) / box.height * lines * LINE;
    const line = Math.floor(top / LINE), row = Math.floor((top - line * LINE) / H);
    const column = line * across + Math.floor((event.clientX - box.left) / box.width * across);
    const inColumn = shown.filter(item => item.column === column);
    const nearest = inColumn.find(item => item.marksOf.some(mark => mark.row === row)) || inColumn[0];
    if (nearest) go(nearest);
  });

  const previous = make("button", { type: "button" }, "← previous"), next = make("button", { type: "button" }, "next →");
  const status = make("span", { role: "status" }), keys = make("span", { class: "keys" }, make("kbd", {}, "←"), " ", make("kbd", {}, "→"), " anywhere in this section");
  const body = make("div");
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  box.replaceChildren(controls, map, make("p", { class: "map-note" }, legend), make("p", { class: "turner" }, previous, next, status, keys), body);

  function update() {
    shown = items.filter(item => Object.values(chosen).every(keep => keep(item)));
    const inside = new Set(shown);
    for (const item of items) for (const mark of item.marks) mark.classList.toggle("out", !inside.has(item));
    go(inside.has(current) ? current : shown[0] || null);
  }
  function turn(by) {
    const at = shown.indexOf(current) + by;
    if (at >= 0 && at < shown.length) go(shown[at]);
  }
  function go(item) {
    current = item;
    const at = shown.indexOf(item);
    status.textContent = item ? `${(at + 1).toLocaleString("en-US")} of ${shown.length.toLocaleString("en-US")}` + (shown.length < items.length ? ` chosen, ${items.length.toLocaleString("en-US")} in all` : "") : "none matches";
    previous.disabled = at <= 0;
    next.disabled = at < 0 || at >= shown.length - 1;
    here.setAttribute("visibility", item ? "visible" : "hidden");
    if (item) {
      here.setAttribute("x", place(item)[0]);
      here.setAttribute("y", place(item)[1] + item.marksOf[0].row * H);
    }
    remember(id, item && item !== items[0] ? keyOf(item) : "");
    hideTip();
    body.replaceChildren(...(item ? detail(item, go) : []));
  }
  const wanted = STATE.get(id);
  current = items.find(item => keyOf(item) === wanted) || null;
  update();
  BROWSERS.push({ section: box.closest("section"), turn });
}

addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1 }[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, summary")) return;
  const focused = BROWSERS.find(each => each.section.contains(document.activeElement));
  const inView = BROWSERS.filter(each => { const box = each.section.getBoundingClientRect(); return box.top < innerHeight / 2 && box.bottom > innerHeight / 2; });
  const chosen = focused || inView[0];
  if (chosen) { event.preventDefault(); chosen.turn(by); }
});

// ---- a text in colours

const TAG = /<\/?(?:think|rethink|answer|episode_\d+)>|<\|[^|<>]{1,40}\|>/g;

// A text from its pieces (one per token), tags dimmed; `spans`: [{ end: in pieces, node }] puts pieces inside of nodes;
// `paint(t)`: {value, scale} of token t, or null.
function coloured(pieces, spans, paint) {
  const text = pieces.join(""), tags = [...text.matchAll(TAG)].map(match => [match.index, match.index + match[0].length]);
  const out = make("bdi"), all = spans.length ? spans : [{ end: pieces.length, node: null }];
  let begin = 0, position = 0, tag = 0;
  for (const { end, node } of [...all, { end: pieces.length, node: null }]) {
    const target = node || out;
    for (let t = begin; t < end; t++) {
      const home = paint ? painted(make("span"), paint(t)) : target;
      for (let a = 0; a < pieces[t].length;) {
        while (tag < tags.length && tags[tag][1] <= position + a) tag++;
        const inside = tag < tags.length && tags[tag][0] <= position + a;
        const stop = tag < tags.length ? Math.min(pieces[t].length, tags[tag][inside ? 1 : 0] - position) : pieces[t].length;
        const part = pieces[t].slice(a, stop);
        home.append(inside ? make("span", { class: "tag" }, part) : part);
        a = stop;
      }
      if (home !== target) target.append(home);
      position += pieces[t].length;
    }
    if (node) out.append(node);
    begin = Math.max(begin, end);
  }
  return out;
}

function painted(node, value) {  // value in [-1, 1]; square roots, so that small ones can be told from none
  if (value === null || value === undefined || !isFinite(value)) return node;
  node.classList.add(value < 0 ? "minus" : "plus");
  node.style.setProperty("--w", Math.sqrt(Math.min(1, Math.abs(value))).toFixed(2));
  return node;
}

const tip = document.body.appendChild(make("div", { class: "tip", role: "tooltip", hidden: "" }));
function showTip(words, beside) {
  tip.textContent = words;
  tip.hidden = false;
  const box = beside.getClientRects()[0] || beside.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const above = box.top - own.height - 6;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (above > 50 ? above : beside.getBoundingClientRect().bottom + 6) + "px";
}
function hideTip() { tip.hidden = true; }
addEventListener("scroll", hideTip, { passive: true });

// Everything inside `root` that speaks of part k (data-k) lights up together; `words(k)` stands beside the text.
function lighting(root, words) {
  const light = k => { for (const node of root.querySelectorAll("[data-k]")) node.classList.toggle("lit", node.dataset.k === k); };
  root.addEventListener("pointerover", event => {
    const node = event.target.closest("[data-k]");
    light(node ? node.dataset.k : null);
    if (node && node.classList.contains("ep")) showTip(words(Number(node.dataset.k)), node); else hideTip();
  });
  root.addEventListener("pointerleave", () => { light(null); hideTip(); });
}

// ---- a figure along the completion: J in [0, 1], and under it panels of bars, all over tokens

// panels: [{ title, values [K], kind: (k, value) -> class of its bar, height }]; J has K or, from the prompt on, K+1 values
function along(ends, J, title, panels) {
  const W = 460, LEFT = 46, RIGHT = 8, GAP = 30, total = ends.at(-1), starts = [0, ...ends.slice(0, -1)], parts = [], scale = [];
  const x = t => LEFT + (W - LEFT - RIGHT) * t / total;
  const label = (place, level, anchor, words) => scale.push(make("text", { x: place, y: level, "text-anchor": anchor }, words));
  const rule = level => scale.push(make("line", { x1: LEFT, x2: W - RIGHT, y1: level, y2: level }));
  let floor = -8;
  function panel(name, height, low, high, ticks) {
    const top = floor + GAP, y = v => top + height * (high - v) / ((high - low) || 1);
    label(2, top - 9, "start", name);
    for (const v of ticks) { rule(y(v)); label(LEFT - 6, y(v) + 4, "end", number(Number(v.toPrecision(2)))); }
    floor = top + height;
    return y;
  }
  if (J) {
    const y = panel(title, 110, 0, 1, [0, 0.5, 1]), places = J.length > ends.length ? [0, ...ends] : ends;
    const points = J.map((v, i) => [x(places[i]), y(Math.min(1, Math.max(0, v)))]).filter((_, i) => J[i] !== null);
    parts.push(make("polyline", { class: "J", points: points.map(point => point.map(v => v.toFixed(1)).join()).join(" ") }));
    for (const [cx, cy] of points) parts.push(make("circle", { class: "knot", cx, cy, r: 3 }));
  }
  for (const { title, values, kind, height } of panels) {
    const there = values.filter(v => v !== null), high = Math.max(0, ...there), low = Math.min(0, ...there);
    const y = panel(title, height, low, high, new Set([high, 0, low]));
    values.forEach((v, k) => parts.push(v === null ? "" : make("rect", { class: `bar ${kind(k, v)}`, x: x(starts[k]) + 0.5, width: Math.max(1, x(ends[k]) - x(starts[k]) - 1),
      y: Math.min(y(v), y(0)), height: Math.max(0.5, Math.abs(y(v) - y(0))) })));
  }
  label(x(0), floor + 17, "start", "0");
  label(x(total / 2), floor + 17, "middle", number(Math.round(total / 2)));
  label(x(total), floor + 17, "end", number(total) + " tokens");
  ends.forEach((end, k) => parts.push(make("rect", { class: "band", "data-k": k, x: x(starts[k]), width: x(end) - x(starts[k]), y: 14, height: floor - 14 })));
  return make("svg", { viewBox: `0 0 ${W} ${floor + 22}`, role: "img", "aria-label": [title, ...panels.map(each => each.title)].join("; ") }, make("g", { class: "scale" }, ...scale), ...parts);
}

// ---- training completions

// group: run, step, problem, q(uestion), gold, level, rows. row: sample, answer, right, reward, n tokens, cut (at the limit),
// advantage (mean), turns, notes; under l2t also ends [K], J [K+1], C (raw compression), P (normalised), R (process reward) [K].
// turn: role, n, pieces, credit ([advantage, how many tokens] pairs), surprise (-log p), entropy, one value per token.

const MODES = {
  reward: "process reward of an episode", credit: "advantage of a token", surprise: "surprise of a token, −log p", entropy: "entropy at a token", none: "nothing",
};
const tokenValues = (turn, mode) => mode === "credit" ? (turn.credit || []).flatMap(([value, count]) => Array(count).fill(value)) : turn[mode] || [];

function training() {
  const items = [];
  DATA.training.forEach((group, column) => group.rows.forEach((row, i) =>
    items.push({ group, data: row, column, marksOf: [{ right: row.right, row: i }] })));
  if (!items.length) return;
  const scales = { reward: 0, credit: 0, surprise: 0, entropy: 0 };
  for (const { data } of items) {
    for (const value of data.R || []) scales.reward = Math.max(scales.reward, Math.abs(value));
    for (const turn of data.turns) {
      for (const [value] of turn.credit || []) scales.credit = Math.max(scales.credit, Math.abs(value));
      for (const mode of ["surprise", "entropy"]) for (const value of turn[mode] || []) scales[mode] = Math.max(scales[mode], value);
    }
  }
  const modes = Object.keys(MODES).filter(mode => mode === "none" || scales[mode] > 0);
  let mode = modes.includes(STATE.get("colour")) ? STATE.get("colour") : modes[0];

  browser("training", items, [
    { name: "run", label: "run", of: item => item.group.run, say: runName },
    { name: "verdict", label: "verdict", of: item => item.data.right, options: [true, false], say: right => right ? "right" : "wrong" },
    { name: "level", label: "level", of: item => item.group.level },
    { name: "step", label: "step", of: item => item.group.step, range: true },
    { name: "tokens", label: "tokens", of: item => item.data.n, range: true },
  ], detail, item => `${item.group.run}.${item.group.step}.${item.group.problem}.${item.data.sample}`,
  "A column is a group of attempts at one problem, from the first step to the last; a full mark is right, a half one wrong.");

  function detail(item, go) {
    const { group, data } = item, select = make("select", {}, ...modes.map(m => make("option", { value: m }, MODES[m])));
    select.value = mode;
    select.addEventListener("change", () => { mode = select.value; remember("colour", mode === modes[0] ? "" : mode); go(item); });
    const siblings = items.filter(other => other.group === group).map(other => {
      const button = make("button", { type: "button", class: other.data.right ? "right" : "wrong", "aria-current": other === item ? "true" : null },
        make("b", {}, other.data.right ? "✓ " : "✗ "), `${other.data.n}`);
      button.addEventListener("click", () => go(other));
      return button;
    });
    const facts = [`${plural(data.n, "token")}`, `reward ${number(data.reward)}`];
    if ("advantage" in data) facts.push(`advantage ${number(data.advantage, "", true)}`);
    for (const [name, value] of Object.entries(data.notes || {})) facts.push(`${name} ${typeof value === "number" ? number(value) : value}`);
    const warnings = [...(data.malformed ? ["malformed tags"] : []), ...(data.cut ? ["cut at the limit"] : [])];
    const card = make("article", { class: data.right ? "right" : "wrong" },
      make("span", { class: "verdict" }, data.right ? "✓ " : "✗ ", make("bdi", {}, data.answer === null ? "no answer" : data.answer)),
      make("p", { class: "chips" }, ...facts.map(fact => make("bdi", {}, fact)), ...warnings.map(w => make("span", { class: "warning" }, w))),
      ...data.turns.map(turn => turnNode(turn, data, group)));
    const side = episodeSide(data), root = make("div", { class: side ? "detail" : "detail plain" }, make("div", {}, modes.length > 1 ? colourLegend(select) : "", card), ...(side ? [side] : []));
    if (side) lighting(root, k => episodeWords(data, k));
    return [
      make("div", { class: "question" }, make("bdi", {}, group.q)),
      make("p", { class: "chips" }, make("span", {}, "gold ", make("b", {}, make("bdi", {}, group.gold))), group.level ? make("bdi", {}, group.level) : null,
        DATA.runs.length > 1 ? make("bdi", {}, runName(group.run)) : null, make("span", {}, `step ${number(group.step)}`),
        make("span", {}, `${group.rows.filter(row => row.right).length} of ${group.rows.length} right`)),
      make("div", { class: "siblings", role: "group", "aria-label": "attempts of this group, with their tokens" }, ...siblings),
      root,
    ].filter(Boolean);
  }

  function colourLegend(select) {
    const signed = mode === "reward" || mode === "credit", stops = [];
    for (let i = signed ? -6 : 0; i <= 6; i++) stops.push(painted(make("i"), i / 6));
    const scale = [make("span", {}, signed ? "−" + number(scales[mode]) : "0"), ...stops, make("span", {}, (signed ? "+" : "") + number(scales[mode])+ " (√ scale)")];
    return make("p", { class: "colours" }, make("label", {}, "colour by ", select), ...(mode === "none" ? [] : scale));
  }

  function turnNode(turn, data, group) {
    const values = mode === "reward" || mode === "none" ? [] : tokenValues(turn, mode);
    const paint = values.length === turn.pieces.length ? t => values[t] / (scales[mode] || 1) : null;
    const spans = (data.ends || []).map((end, k) => ({ end, node: mode === "reward" && data.R ? painted(make("span", { class: "ep", "data-k": k }), data.R[k] / (scales.reward || 1)) : make("span", { class: "ep", "data-k": k }) }));
    const text = make("pre", { tabindex: "0" }, coloured(turn.pieces, spans, paint));
    if (data.turns.length === 1 && turn.role === "policy") return text;
    return make("div", { class: `turn ${turn.role === "short" ? "short" : "long"}` }, make("p", {}, make("b", {}, turn.role), ` · ${plural(turn.n, "token")}` + (turn.credit ? " · trained" : "")), text);
  }
}

const at = (list, k) => list && k < list.length ? list[k] : null;

function meanCredit(data, k) {
  const values = data.turns.length === 1 ? tokenValues(data.turns[0], "credit") : [], own = values.slice(k ? data.ends[k - 1] : 0, data.ends[k]);
  return own.length ? mean(own) : null;
}

function episodeWords(data, k) {
  const tokens = data.ends[k] - (k ? data.ends[k - 1] : 0), lines = [`episode ${k + 1} of ${data.ends.length} · ${plural(tokens, "token")}`];
  if (at(data.J, k + 1) !== null) lines.push(`J ${number(data.J[k])} → ${number(data.J[k + 1])} · fitting gain ${number(data.J[k + 1] - data.J[k], "", true)}`);
  if (at(data.C, k) !== null || at(data.P, k) !== null) lines.push(`compression ${number(at(data.C, k))} raw · ${number(at(data.P, k))} normalised`);
  const paid = [];
  if (at(data.R, k) !== null) paid.push(`process reward ${number(data.R[k], "", true)}`);
  if (meanCredit(data, k) !== null) paid.push(`advantage ${number(meanCredit(data, k), "", true)}`);
  return [...lines, ...(paid.length ? [paid.join(" · ")] : [])].join("\n");
}

function episodeSide(data) {
  if (!data.ends || !(data.J || data.R || data.P)) return null;
  const panels = [
    data.R && { title: "process reward", values: data.R, height: 70, kind: (k, v) => v < 0 ? "minus" : "plus" },
    data.P && { title: "Ĉ, normalised compression", values: data.P, height: 36, kind: () => "cost" },
  ].filter(Boolean);
  const rows = data.ends.map((end, k) => make("tr", { "data-k": k }, make("th", {}, String(k + 1)), ...[
    number(end - (k ? data.ends[k - 1] : 0)), fixed(at(data.J, k + 1)), fixed(at(data.J, k + 1) === null ? null : data.J[k + 1] - data.J[k], true),
    number(at(data.C, k)), fixed(at(data.P, k)), fixed(at(data.R, k), true), fixed(meanCredit(data, k), true)].map(text => make("td", {}, text))));
  const head = ["k", "tokens", "J", "gain", "C", "Ĉ", "reward", "adv."].map(word => make("th", {}, word));
  return make("div", {}, along(data.ends, data.J, "J, predicted correctness", panels),
    make("div", { class: "scroll" }, make("table", { class: "episodes" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))));
}

// ---- the same held-out problem before and after

function heldOut() {
  const items = DATA.held_out.map((problem, column) => ({ problem, column, marksOf: problem.cells.map((cell, row) => ({ right: cell.right, row })) }));
  const verdicts = DATA.columns.map((name, c) => ({ name: `c${c}`, label: name, of: item => item.problem.cells[c].right, options: [true, false], say: right => right ? "right" : "wrong" }));
  browser("held_out", items, [
    { name: "decoding", label: "decoding", of: item => item.problem.decoding, options: ["sampled", "greedy"], first: "sampled" },
    ...verdicts,
    { name: "level", label: "level", of: item => item.problem.level },
    { name: "tokens", label: "tokens, last", of: item => item.problem.cells.at(-1).n, range: true },
  ], ({ problem }) => [
    make("div", { class: "question" }, make("bdi", {}, problem.q)),
    make("p", { class: "chips" }, make("span", {}, "gold ", make("b", {}, make("bdi", {}, problem.gold))), problem.level ? make("bdi", {}, problem.level) : null, make("span", {}, problem.decoding)),
    make("div", { class: "pair" }, ...problem.cells.map((cell, c) => make("article", { class: cell.right ? "right" : "wrong" },
      make("span", { class: "verdict" }, cell.right ? "✓ " : "✗ ", make("bdi", {}, cell.answer === null ? "no answer" : cell.answer)),
      make("p", { class: "chips" }, make("b", {}, make("bdi", {}, DATA.columns[c])), make("span", {}, plural(cell.n, "token")),
        cell.share ? make("span", {}, `${cell.share} right`) : null, cell.cut ? make("span", { class: "warning" }, "cut at the limit") : null),
      ...cell.turns.map(turn => {
        const text = make("pre", { tabindex: "0" }, coloured(turn.pieces, [], null));
        return cell.turns.length === 1 && turn.role === "policy" ? text
          : make("div", { class: `turn ${turn.role === "short" ? "short" : "long"}` }, make("p", {}, make("b", {}, turn.role), ` · ${plural(turn.n, "token")}`), text);
      })))),
  ], item => `${item.problem.decoding}.${item.problem.problem}`,
  `A column is a problem, its marks from above: ${DATA.columns.join("; ")}. A full mark is right, a half one wrong.`);
}

// ---- chains of chunk.py

// chain: q, gold, thoughts, labels, lengths, J (accuracy of the rollouts behind each thought), R (importance).
function chains() {
  const items = DATA.chains.map((chain, column) => ({ chain, column, marksOf: [{ right: chain.J.at(-1) >= 0.5, row: 0 }] }));
  const scale = Math.max(...DATA.chains.flatMap(chain => chain.R.map(Math.abs)), 1e-9);
  browser("chains", items, [
    { name: "thoughts", label: "thoughts", of: item => item.chain.thoughts.length, range: true },
    { name: "longs", label: "thoughts labelled long", of: item => item.chain.labels.filter(label => label === "long").length, range: true },
  ], ({ chain }) => {
    let total = 0;
    const ends = chain.lengths.map(length => total += length);
    const words = k => `thought ${k + 1} of ${ends.length}, ${chain.labels[k]} · ${plural(chain.lengths[k], "token")}\naccuracy behind it ${number(chain.J[k])} · importance ${number(chain.R[k], "", true)}`;
    const spans = chain.thoughts.map((_, k) => ({ end: k + 1, node: painted(make("span", { class: "ep", "data-k": k }), chain.R[k] / scale) }));
    const pieces = chain.thoughts.map((text, k) => text + (k < chain.thoughts.length - 1 ? "\n" : ""));
    const root = make("div", { class: "detail" },
      make("div", {}, make("article", { class: "chain" }, make("pre", { tabindex: "0" }, coloured(pieces, spans, null)))),
      make("div", {}, along(ends, chain.J, "accuracy of the rollouts behind a thought", [{ title: "importance, in the colour of the label", values: chain.R, height: 90, kind: k => chain.labels[k] }])));
    lighting(root, words);
    return [make("div", { class: "question" }, make("bdi", {}, chain.q)), make("p", { class: "chips" }, make("span", {}, "gold ", make("b", {}, make("bdi", {}, chain.gold))), make("span", {}, plural(chain.thoughts.length, "thought"))), root];
  }, item => `${item.chain.run}.${item.chain.problem}`, "A mark is a chain; a full one is right in at least half of the rollouts behind its last thought.");
}

sections();
reloading();
choosingRuns();
curves();
heldOut();
training();
chains();
if (matchMedia("(max-width: 30rem)").matches) [...document.querySelectorAll("#curves details")].slice(1).forEach(each => { each.open = false; });
for (const id of ["held_out", "training", "chains"]) if (STATE.has(id) && location.hash.startsWith(`#${id}=`)) document.querySelector(`[data-browser=${id}]`)?.scrollIntoView();
