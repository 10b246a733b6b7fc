"use strict";
// Draws what stands in #data. All that comes from there is set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");

// --- elements

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "colour") node.style.setProperty("background", value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}
const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

const colourOf = (name) => `var(--c${Math.max(0, data.names.indexOf(name)) % 8})`;
const dot = (colour) => el("span", { class: "dot", colour });
const fixed = (value, digits = 2) =>
  value === null || value === undefined ? "–" : (Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits).replace("-", "−");
const signed = (value) => (value > 0.005 ? "+" : "") + fixed(value);
const grouped = (value) => (typeof value === "number" ? value.toLocaleString("en") : "–");
const short = (value) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
};
const plural = (count, noun) => `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;

// --- charts

function ticks(low, high, log, most = 5) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of [1, 2, 5]) {
        const value = factor * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    return found.length > 6 ? found.filter((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9) : found;
  }
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return found;
}

// series: {name, colour, points: [[x, y], ...], dashed, dots}; bars: {x, y, low, high, colour}; rules: {y, text}
function chart({ title, series = [], bars = [], rules = [], x = "", y = "", logX = false, logY = false, zero = false, whole = false, names = true, from = null }) {
  const W = 420, H = 232, left = 50, right = 12, top = 12, bottom = 38;
  const ok = (point) => point[1] !== null && point[0] !== null && (!logY || point[1] > 0) && (!logX || point[0] > 0);
  const drawn = series.map((line) => ({ ...line, points: line.points.filter(ok) })).filter((line) => line.points.length);
  const xs = [...drawn.flatMap((l) => l.points.map((p) => p[0])), ...bars.map((b) => b.x)];
  const ys = [
    ...drawn.flatMap((l) => l.points.map((p) => p[1])),
    ...bars.flatMap((b) => [b.y, b.low ?? b.y, b.high ?? b.y]),
    ...rules.map((r) => r.y),
  ];
  const box = el("div", { class: "card plot" }, el("h3", {}, title));
  if (!xs.length) return box.append(el("p", { class: "soft" }, "Nothing to draw.")), box;
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (from !== null) x0 = Math.min(x0, from);
  if (bars.length) [x0, x1] = [x0 - 0.6, x1 + 0.6];
  else if (x0 === x1) [x0, x1] = logX ? [x0 / 2, x1 * 2] : [x0 - 1, x1 + 1];
  if (logY) [y0, y1] = [y0 / 1.12, y1 * 1.12];
  else {
    if (zero || bars.length || (y0 > 0 && y0 < 0.5 * y1)) y0 = Math.min(0, y0);
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    y1 += room;
    if (y0 !== 0) y0 -= room;
  }
  const scale = (value, low, high, from, to, log) =>
    from + ((to - from) * ((log ? Math.log(value) : value) - (log ? Math.log(low) : low))) /
      ((log ? Math.log(high) : high) - (log ? Math.log(low) : low));
  const X = (value) => scale(value, x0, x1, left, W - right, logX);
  const Y = (value) => scale(value, y0, y1, H - bottom, top, logY);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${y} against ${x}` });
  for (const value of ticks(y0, y1, logY)) {
    picture.append(
      svg("line", { class: "axis", x1: left, x2: W - right, y1: Y(value), y2: Y(value) }),
      svg("text", { x: left - 7, y: Y(value) + 4, "text-anchor": "end" }, short(value))
    );
  }
  let xTicks = ticks(x0, x1, logX, 6);
  if (whole) xTicks = [...new Set(xTicks.map(Math.round))].filter((v) => v >= x0 && v <= x1);
  for (const value of xTicks) {
    picture.append(svg("text", { x: X(value), y: H - bottom + 16, "text-anchor": "middle" }, short(value)));
  }
  picture.append(svg("text", { x: W - right, y: H - 4, "text-anchor": "end" }, x));
  for (const rule of rules) {
    picture.append(
      svg("line", { class: "rule", x1: left, x2: W - right, y1: Y(rule.y), y2: Y(rule.y) }),
      svg("text", { x: W - right, y: Y(rule.y) - 4, "text-anchor": "end" }, rule.text)
    );
  }
  const width = bars.length ? Math.min(26, (0.7 * (W - left - right)) / (x1 - x0)) : 0;
  for (const bar of bars) {
    const [from, to] = [Y(Math.max(0, bar.y)), Y(Math.min(0, bar.y))];
    picture.append(svg("rect", { x: X(bar.x) - width / 2, y: from, width, height: Math.max(0.5, to - from), rx: 2, fill: bar.colour }));
    if (bar.low !== undefined && bar.low !== null) {
      picture.append(svg("line", { x1: X(bar.x), x2: X(bar.x), y1: Y(bar.low), y2: Y(bar.high), stroke: "var(--ink)", "stroke-width": 1.4 }));
    }
  }
  for (const line of drawn) {
    const path = line.points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)},${Y(p[1]).toFixed(1)}`).join("");
    picture.append(svg("path", { d: path, fill: "none", stroke: line.colour, "stroke-width": 1.7, "stroke-linejoin": "round", "stroke-dasharray": line.dashed ? "5 4" : null }));
    if (line.dots || line.points.length < 12) {
      for (const p of line.points) picture.append(svg("circle", { cx: X(p[0]), cy: Y(p[1]), r: 3, fill: line.colour }));
    }
  }
  const mark = svg("line", { class: "rule", y1: top, y2: H - bottom, visibility: "hidden" });
  const tip = el("div", { class: "tip", hidden: true });
  const points = [...drawn, ...(bars.length ? [{ name: y, colour: bars[0].colour, points: bars.map((b) => [b.x, b.y]) }] : [])];
  picture.append(mark);
  picture.addEventListener("pointermove", (event) => {
    const place = picture.getBoundingClientRect();
    const at = ((event.clientX - place.left) / place.width) * W;
    const all = points.flatMap((line) => line.points.map((p) => p[0]));
    const nearest = all.reduce((best, v) => (Math.abs(X(v) - at) < Math.abs(X(best) - at) ? v : best), all[0]);
    mark.setAttribute("x1", X(nearest));
    mark.setAttribute("x2", X(nearest));
    mark.setAttribute("visibility", "visible");
    const rows = points.map((line) => [line, line.points.find((p) => p[0] === nearest)]).filter(([, p]) => p);
    tip.replaceChildren(el("div", {}, `${x} ${grouped(nearest)}`), ...rows.slice(0, 14).map(([line, p]) => el("div", {}, dot(line.colour), `${line.name}  ${short(p[1])}`)));
    tip.hidden = false;
    const across = (X(nearest) / W) * place.width;
    tip.style.setProperty("top", `${picture.offsetTop + 8}px`);
    tip.style.setProperty(across > place.width / 2 ? "right" : "left", `${(across > place.width / 2 ? place.width - across : across) + 28}px`);
    tip.style.removeProperty(across > place.width / 2 ? "left" : "right");
  });
  picture.addEventListener("pointerleave", () => {
    tip.hidden = true;
    mark.setAttribute("visibility", "hidden");
  });
  if (y) box.append(el("div", { class: "soft" }, y));
  box.append(picture, tip);
  if (names && drawn.length > 1) {
    box.append(el("div", { class: "keys" }, drawn.map((line) => el("span", {}, dot(line.colour), line.name))));
  }
  return box;
}

const RAMP = [[68, 92, 170], [38, 140, 142], [102, 178, 98], [226, 164, 48], [206, 86, 58]];
function ramp(share) {
  const place = Math.min(0.9999, Math.max(0, share)) * (RAMP.length - 1), low = Math.floor(place);
  return `rgb(${RAMP[low].map((v, i) => Math.round(v + (RAMP[low + 1][i] - v) * (place - low))).join(" ")})`;
}
const rampKey = (low, high) =>
  el("span", { class: "soft" }, low, el("span", { class: "ramp", colour: `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(ramp).join(", ")})` }), high);

// --- the table of models

function whisker(low, middle, high, from, to, colour, zero) {
  const W = 118, H = 22, X = (v) => 4 + ((W - 8) * (v - from)) / (to - from || 1);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, width: W, "aria-hidden": "true" });
  picture.style.setProperty("width", `${W}px`);
  if (zero) picture.append(svg("line", { class: "rule", x1: X(0), x2: X(0), y1: 0, y2: H }));
  if (low !== null) {
    picture.append(svg("line", { x1: X(low), x2: X(high), y1: H / 2, y2: H / 2, stroke: colour, "stroke-width": 2.4, "stroke-linecap": "round", opacity: 0.55 }));
  }
  if (middle !== null) picture.append(svg("circle", { cx: X(middle), cy: H / 2, r: 4, fill: colour }));
  return picture;
}

function modelTable(shown) {
  const box = el("div", { class: "card wide" });
  const draw = (base) => {
    const bounds = shown.models.flatMap((m) => [m.wer, ...(m.interval || [])]).filter((v) => v !== null);
    const [from, to] = [Math.min(...bounds), Math.max(...bounds)];
    const known = shown.models.map((_, i) => (i === base ? null : shown.differences[i][base]));
    const edges = [0, ...known.flat().filter((v) => v !== null)];
    const several = shown.models.length > 1;
    const heads = ["", "WER %", "95 % interval", "", "CER %", "sub / ins / del", "wrong", ...(several ? ["minus", "95 % interval", ""] : []), "parameters"];
    const rows = shown.models.map((model, i) => {
      const difference = known[i];
      const told = difference && (difference[1] > 0 || difference[2] < 0);
      const chosen = el("input", { type: "radio", name: `base-${shown.split}-${shown.manifest_hash}`, checked: i === base, title: "compare the others with this one", onchange: () => draw(i) });
      const minus = i === base
        ? [el("td", { class: "number soft" }, "–"), el("td", { class: "soft" }, "compared with"), el("td", {})]
        : difference === null
          ? [el("td", {}), el("td", {}), el("td", {})]
          : [
              el("td", { class: `number ${told ? "strong" : "soft"}` }, signed(difference[0])),
              el("td", { class: told ? "" : "soft" }, `${signed(difference[1])} to ${signed(difference[2])}`),
              el("td", {}, whisker(difference[1], difference[0], difference[2], Math.min(...edges), Math.max(...edges), told ? colourOf(model.name) : "var(--soft)", true)),
            ];
      return el("tr", {},
        el("td", { title: model.folder }, el("label", {}, several && chosen, dot(colourOf(model.name)), model.name)),
        el("td", { class: "number strong" }, fixed(model.wer)),
        el("td", { class: "number" }, model.interval ? `${fixed(model.interval[0])} to ${fixed(model.interval[1])}` : "–"),
        el("td", {}, whisker(...(model.interval ? [model.interval[0], model.wer, model.interval[1]] : [null, model.wer, null]), from, to, colourOf(model.name))),
        el("td", { class: "number" }, fixed(model.cer)),
        el("td", { class: "number" }, ["substitutions", "insertions", "deletions"].map((key) => grouped(model[key])).join(" / ")),
        el("td", { class: "number", title: "utterances with an edit" }, grouped(model.with_errors)),
        several && minus,
        el("td", { class: "number" }, grouped(model.parameters)));
    });
    const left = new Set(["", "95 % interval"]);
    box.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { class: left.has(head) && i !== 2 ? null : "number" }, head)))), el("tbody", {}, rows)));
  };
  draw(0);
  return box;
}

// --- utterances

function columns(utterance, place) {
  const { signs, words } = utterance.heard[place];
  const said = utterance.reference.split(" ").filter(Boolean);
  let at = 0, edit = 0;
  return [...signs].map((sign) => {
    const reference = sign === "I" ? null : said[at++];
    const heard = sign === "=" ? reference : sign === "D" ? null : words[edit++];
    return { sign, reference, heard };
  });
}

const hit = (word, wanted) => word !== null && word !== undefined && word.toLowerCase() === wanted;

function inline(utterance, place) {
  return columns(utterance, place).map(({ sign, reference, heard }) => [
    sign === "=" ? reference : el("span", { class: `edit ${sign}` }, sign === "D" ? reference : heard), " "]);
}

function card(shown, utterance, place, wanted, beside) {
  const own = utterance.heard[place];
  const audio = utterance.audio === undefined ? null
    : el("audio", { controls: true, preload: "none", src: `data:${data.audio_facts.format};base64,${data.audio[utterance.audio]}` });
  const words = columns(utterance, place).map(({ sign, reference, heard }) =>
    el("span", { class: `word ${sign === "=" ? "same" : sign}${wanted && (hit(reference, wanted) || hit(heard, wanted)) ? " found" : ""}` },
      el("span", { class: "said" }, reference ?? "\u00a0"), el("span", { class: "heard" }, heard ?? "\u00a0")));
  const others = !beside ? [] : shown.models.map((model, i) => i === place ? null : [
    el("span", {}, dot(colourOf(model.name)), `${model.name} ${utterance.heard[i].errors}`), el("span", {}, inline(utterance, i))]).filter(Boolean);
  return el("article", { class: "card utterance", "data-id": utterance.id },
    el("div", { class: "about" }, el("span", { class: "errors" }, plural(own.errors, "edit")), el("span", { class: "id" }, utterance.id),
      utterance.speaker !== undefined && el("span", {}, `speaker ${utterance.speaker}`),
      utterance.seconds !== null && el("span", {}, `${fixed(utterance.seconds, 1)} s`), audio),
    el("div", { class: "words" }, words),
    others.length > 0 && el("div", { class: "other" }, others));
}

const SORTS = {
  "most edits": (place) => (a, b) => b.heard[place].errors - a.heard[place].errors,
  "most edits a word": (place) => {
    const rate = (u) => u.heard[place].errors / Math.max(1, u.reference.split(" ").length);
    return (a, b) => rate(b) - rate(a);
  },
  "worse than the first model": (place) => {
    const worse = (u) => u.heard[place].errors - u.heard[0].errors;
    return (a, b) => worse(b) - worse(a);
  },
  "longest": () => (a, b) => (b.seconds ?? 0) - (a.seconds ?? 0),
  "id": () => () => 0,
};

function utteranceList(shown) {
  let many = 20;
  const option = (text, value = text) => el("option", { value }, text);
  const model = el("select", { class: "model" }, shown.models.map((m, i) => option(m.name, i)));
  const sort = el("select", { class: "sort" }, Object.keys(SORTS).filter((name) => shown.models.length > 1 || !name.startsWith("worse")).map((name) => option(name)));
  const speakers = [...new Set(shown.utterances.map((u) => u.speaker).filter((s) => s !== undefined))].sort();
  const speaker = el("select", { class: "speaker" }, option("all", ""), speakers.map((name) => option(name, `=${name}`)));
  const word = el("input", { class: "word-filter", type: "search", placeholder: "a word", spellcheck: "false" });
  const edited = el("input", { class: "edited", type: "checkbox" });
  const beside = el("input", { class: "beside", type: "checkbox" });
  const count = el("p", { class: "soft count", role: "status" });
  const list = el("div", {});
  const more = el("button", { class: "more", onclick: () => { many += 50; draw(); } }, "Show more");
  const pairs = el("div", { class: "pairs" });

  const matches = (utterance, place, wanted) => {
    if (speaker.value && `=${utterance.speaker}` !== speaker.value) return false;
    if (!wanted) return !edited.checked || utterance.heard[place].errors > 0;
    return columns(utterance, place).some(({ sign, reference, heard }) =>
      (!edited.checked || sign !== "=") && (hit(reference, wanted) || hit(heard, wanted)));
  };
  const draw = () => {
    const place = Number(model.value), wanted = word.value.trim().toLowerCase();
    const found = shown.utterances.filter((u) => matches(u, place, wanted)).sort(SORTS[sort.value](place));
    count.textContent = `${plural(found.length, "utterance")}${found.length > many ? `, ${many} of them below` : ""}.`;
    list.replaceChildren(...found.slice(0, many).map((u) => card(shown, u, place, wanted, beside.checked)));
    more.hidden = found.length <= many;
  };
  const drawPairs = () => {
    const seen = new Map();
    for (const utterance of shown.utterances) {
      for (const { sign, reference, heard } of columns(utterance, Number(model.value))) {
        if (sign === "=") continue;
        const key = `${sign} ${reference ?? ""} ${heard ?? ""}`;
        const known = seen.get(key) || { sign, reference, heard, times: 0 };
        known.times += 1;
        seen.set(key, known);
      }
    }
    const top = [...seen.values()].sort((a, b) => b.times - a.times).slice(0, 12);
    pairs.replaceChildren(...top.map(({ sign, reference, heard, times }) =>
      el("button", { title: "show where", onclick: () => { word.value = reference ?? heard; edited.checked = true; many = 20; draw(); } },
        sign === "S" ? [reference, " → ", el("span", { class: "edit S" }, heard)] : el("span", { class: `edit ${sign}` }, reference ?? heard),
        el("span", { class: "soft" }, ` ${times}`))));
  };
  for (const control of [sort, speaker, edited, beside]) control.addEventListener("change", () => { many = 20; draw(); });
  model.addEventListener("change", () => { drawPairs(); draw(); });
  word.addEventListener("input", () => { many = 20; draw(); });
  drawPairs();
  draw();
  const left = shown.num_utterances - shown.utterances.length;
  return [
    el("h2", {}, `Utterances of ${shown.split}`),
    el("p", { class: "soft" }, "Above, what was said; below, what the model heard: ",
      el("span", { class: "sample S" }, "substituted"), " ", el("span", { class: "sample D" }, "deleted"), " ", el("span", { class: "sample I" }, "inserted"), "."),
    left > 0 && el("p", { class: "note" }, `The ${grouped(shown.utterances.length)} worst of ${plural(shown.num_utterances, "utterance")} are here, ${grouped(left)} are left out; rates and intervals are of all.`),
    audioNote(),
    pairs.childNodes.length > 0 && el("h3", {}, "Most frequent edits"), pairs,
    el("div", { class: "controls" },
      shown.models.length > 1 && el("label", {}, "Model", model), el("label", {}, "First come", sort), el("label", {}, "Word", word),
      speakers.length > 0 && el("label", {}, "Speaker", speaker),
      el("label", { class: "inline" }, edited, "edits only"),
      shown.models.length > 1 && el("label", { class: "inline" }, beside, "other models beside")),
    count, list, more];
}

function audioNote() {
  const { embedded, left_out, unreadable, why } = data.audio_facts;
  const parts = [];
  if (left_out) parts.push(`The sound of the ${plural(embedded, "worst utterance")} is here; that of ${grouped(left_out)} is left out for size.`);
  if (unreadable) parts.push(`There is no sound of ${plural(unreadable, "utterance")}${why ? ` (${why})` : ""}.`);
  return parts.length > 0 && el("p", { class: "note" }, parts.join(" "));
}

// --- runs

const TITLES = { gradient_norm: "Gradient norm", learning_rate: "Learning rate" };
const titleOf = (key) => TITLES[key] || (key.startsWith("loss/") ? `Loss: ${key.slice(5)}` : key.startsWith("valid/") ? `Validation: ${key.slice(6)}` : key);
const rankOf = (key) => (key.startsWith("valid/") ? 0 : key.startsWith("loss/") ? 1 : 2);

function runSection() {
  const hidden = new Set();
  let logY = false;
  const grid = el("div", { class: "grid" }), layers = el("div", { class: "grid" });
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  const plain = keys.filter((key) => !key.startsWith("layer_distance/")).sort((a, b) => rankOf(a) - rankOf(b));
  const deep = keys.filter((key) => key.startsWith("layer_distance/")).sort();
  const draw = () => {
    const runs = data.runs.filter((run) => !hidden.has(run.name));
    grid.replaceChildren(...plain.map((key) => chart({
      title: titleOf(key) + (key === "valid/WER" ? ", %" : ""), x: "step", from: 0, zero: key.startsWith("valid/"), logY: logY && key !== "learning_rate", names: false,
      series: runs.filter((run) => run.curves[key]).map((run) => ({ name: run.name, colour: colourOf(run.name), points: run.curves[key], dashed: data.names.indexOf(run.name) > 7, dots: key.startsWith("valid/") && run.curves[key].length < 60 })),
    })));
    layers.replaceChildren(...runs.filter((run) => deep.some((key) => run.curves[key])).map((run) => {
      const own = deep.filter((key) => run.curves[key]);
      const box = chart({ title: run.name, x: "step", from: 0, logY, names: false, zero: true,
        series: own.map((key, i) => ({ name: `layer ${Number(key.slice(15))}`, colour: ramp(i / Math.max(1, own.length - 1)), points: run.curves[key] })) });
      box.append(rampKey(`layer ${Number(own[0].slice(15))}`, `${Number(own[own.length - 1].slice(15))}`));
      return box;
    }));
  };
  const legend = el("div", { class: "legend" }, data.runs.length > 1 && data.runs.map((run) =>
    el("button", { title: "show or hide", onclick: (event) => {
      hidden.has(run.name) ? hidden.delete(run.name) : hidden.add(run.name);
      event.currentTarget.classList.toggle("off", hidden.has(run.name));
      draw();
    } }, dot(colourOf(run.name)), run.name)),
    el("label", {}, el("input", { type: "checkbox", onchange: (event) => { logY = event.target.checked; draw(); } }), "logarithmic"));
  draw();
  const rows = data.runs.map((run) => el("tr", {},
    el("td", { title: run.folder }, dot(colourOf(run.name)), run.name),
    el("td", { class: "number" }, grouped(run.last_step + 1)),
    el("td", {}, run.best ? [el("span", { class: "strong" }, fixed(run.best.value)), ` ${run.best.metric}, step ${grouped(run.best.step)}`] : "–"),
    el("td", { class: "number" }, grouped(run.skipped)),
    el("td", {}, run.starts.length ? `${(run.starts[0].time || "").slice(0, 16).replace("T", " ")}${run.starts.length > 1 ? `, ${run.starts.length} starts` : ""}` : "–")));
  return [
    el("h2", { id: "training" }, "Training"),
    data.runs.filter((run) => run.is_cut).map((run) => el("p", { class: "note" }, `The log of ${run.name} ends in half a line, which is left out: the run goes on, or was killed.`)),
    el("div", { class: "card wide" }, el("table", {}, el("thead", {}, el("tr", {}, ["Run", "Steps", "Best validation", "Skipped steps", "Started (UTC)"].map((h, i) => el("th", { class: i === 1 || i === 3 ? "number" : null }, h)))), el("tbody", {}, rows))),
    legend, grid,
    deep.length > 0 && [el("h2", {}, "Distance to the teacher, layer by layer"), layers],
    data.settings.length > 0 && [
      el("h2", {}, "Settings that differ"),
      el("div", { class: "card wide" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "Key"), data.runs.map((run) => el("th", {}, dot(colourOf(run.name)), run.name)))),
        el("tbody", {}, data.settings.map((row) => el("tr", {}, el("td", { class: "strong" }, row.key), row.values.map((value) => el("td", { class: "value" }, value ?? "–"))))))),
    ],
    data.runs.filter((run) => run.settings || run.command).map((run) => el("details", {}, el("summary", {}, `${run.name}: command and settings`),
      run.command && el("pre", {}, run.command), run.settings && el("pre", {}, run.settings))),
  ];
}

// --- figures of layers and lengths

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const last = (text) => text.split("/").filter(Boolean).slice(-2).join("/");

const FIGURES = {
  drift({ found }) {
    const { layers, waypoints, borders, suggestion } = found;
    const rules = [["large", "large (our reading)"], ["small", "small (our reading)"]].filter(([key]) => borders && key in borders).map(([key, text]) => ({ y: borders[key], text }));
    const line = (values) => values.map((value, i) => [i, value]);
    const steps = waypoints || [];
    return [
      el("p", { class: "soft" }, `Cosine distance of hidden states, ${last(String(found.source))} to ${last(String(found.teacher))}: mean ${fixed(found.mean, 3)}. Suggested guidance: ${suggestion.modes.join(", ")}${suggestion.clear ? "" : " (uncertain)"}; ${suggestion.reason}.`),
      el("div", { class: "grid" },
        chart({ title: "After each layer", x: "layer", y: "cosine distance", whole: true, zero: true, rules, names: steps.length < 6,
          series: [...steps.map((w, i) => ({ name: `to step ${w.step}`, colour: ramp(i / Math.max(1, steps.length - 1)), points: line(w.from_source) })), { name: "source to teacher", colour: "var(--ink)", points: line(layers), dots: true }] }),
        steps.length > 0 && chart({ title: "Mean over the layers", x: "step of the waypoint", y: "cosine distance", zero: true, rules,
          series: [{ name: "source to waypoint", colour: "var(--c0)", points: steps.map((w) => [w.step, mean(w.from_source)]) }, { name: "waypoint to teacher", colour: "var(--c1)", points: steps.map((w) => [w.step, mean(w.to_teacher)]) }] })),
    ];
  },
  layer_importance({ found }) {
    const rows = [...found.layers].sort((a, b) => a.layer - b.layer);
    const known = rows.filter((row) => row.wer_added !== null && row.wer_added !== undefined);
    const memory = rows.flatMap((row) => Object.entries(row.memory_frames || {}).map(([way, heads], side) => ({ way, side, heads, layer: row.layer })));
    const ways = [...new Set(memory.map((m) => m.way))];
    return [
      el("p", { class: "soft" }, `What converting one layer alone costs ${last(String(found.teacher))}. Keep attention in ${(found.keep || []).length === 1 ? "layer" : "layers"} ${(found.keep || []).join(", ")} (ranked by ${found.ranked_by}). ${found.caveat || ""}`),
      el("div", { class: "grid" },
        known.length > 0 && chart({ title: "Words", x: "layer", y: "WER minus the teacher's, points (95 % intervals)", whole: true, bars: known.map((row) => ({ x: row.layer, y: row.wer_added, low: row.wer_added_interval && row.wer_added_interval[0], high: row.wer_added_interval && row.wer_added_interval[1], colour: "var(--c0)" })) }),
        chart({ title: "Output distribution", x: "layer", y: "KL from the teacher, nats a frame", whole: true, bars: rows.map((row) => ({ x: row.layer, y: row.kl, colour: "var(--c1)" })) }),
        chart({ title: "Hidden states", x: "layer", y: "cosine distance to the teacher", whole: true, zero: true, series: [
          { name: "after the layer", colour: "var(--c0)", points: rows.map((row) => [row.layer, row.distance_after_layer]) },
          { name: "after the last layer", colour: "var(--c1)", points: rows.map((row) => [row.layer, row.distance_at_end]) },
          ...(found.student ? [{ name: "the student, all at once", colour: "var(--ink)", dashed: true, points: found.student.distances.map((v, i) => [i, v]) }] : [])] }),
        memory.length > 0 && chart({ title: "Effective memory of the heads", x: "layer", y: "frames until 1 % is left (median of the heads)", whole: true, logY: true, series: ways.map((way, i) => ({ name: way, colour: `var(--c${i})`, points: memory.filter((m) => m.way === way && m.heads.length).map((m) => [m.layer, [...m.heads].sort((a, b) => a - b)[Math.floor(m.heads.length / 2)]]) })) })),
    ];
  },
  restoring({ found }) {
    const count = (step) => step.restored.length;
    return [
      el("p", { class: "soft" }, `Attention given back to ${last(String(found.student_folder))}, layer after layer: ${(found.restored || []).join(", ")}.`),
      el("div", { class: "grid" },
        chart({ title: "Output distribution", x: "layers restored", y: "KL from the teacher, nats a frame", whole: true, zero: true, series: [{ name: "KL", colour: "var(--c1)", points: found.steps.map((s) => [count(s), s.kl]) }] }),
        chart({ title: "Words", x: "layers restored", y: "WER, %", whole: true, zero: true, rules: found.teacher_wer === null || found.teacher_wer === undefined ? [] : [{ y: found.teacher_wer, text: "teacher" }], series: [{ name: "WER", colour: "var(--c0)", points: found.steps.map((s) => [count(s), s.wer]) }] }),
        chart({ title: "Each layer restored alone", x: "layer", y: "lowers the KL by", whole: true, bars: Object.entries(found.gains).map(([layer, gain]) => ({ x: Number(layer), y: gain, colour: "var(--c2)" })) })),
    ];
  },
  by_length({ found }) {
    const lengths = found.filter((row) => String(row.condition).startsWith("x "));
    const pauses = [...new Set(lengths.map((row) => row.condition.split(", ")[1]))];
    const models = [...new Set(found.map((row) => row.model))];
    return el("div", { class: "grid" }, pauses.map((pause) => chart({ title: `Joined utterances, ${pause}`, x: "seconds of a recording", y: "WER, %", logX: true, zero: true,
      series: models.map((model, i) => ({ name: last(String(model)), colour: `var(--c${i % 8})`, dots: true, points: lengths.filter((row) => row.model === model && row.condition.endsWith(pause)).map((row) => [row["s each"], row["WER %"]]).sort((a, b) => a[0] - b[0]) })) })));
  },
  lookahead({ found }) {
    const whole = found.find((row) => row.lookahead === "whole");
    return el("div", { class: "grid" }, chart({ title: "Live reading", x: "seconds of lookahead", y: "WER, %", zero: true, rules: whole && whole["WER %"] !== null ? [{ y: whole["WER %"], text: "whole recording" }] : [],
      series: [{ name: "WER", colour: "var(--c0)", dots: true, points: found.filter((row) => row.lookahead !== "whole").map((row) => [parseFloat(row.lookahead), row["WER %"]]) }] }));
  },
};
const FIGURE_TITLES = { drift: "Drift", layer_importance: "Layer importance", restoring: "Restored attention", by_length: "WER against length", lookahead: "WER against lookahead" };

// --- the page

page.append(
  el("header", {}, el("h1", {}, data.title), el("span", { class: "soft" }, `cald_speech ${data.version}, ${data.made}`)),
  el("nav", {}, data.sets.length > 0 && el("a", { href: "#models" }, "Models"), data.runs.length > 0 && el("a", { href: "#training" }, "Training"),
    data.figures.length > 0 && el("a", { href: "#layers" }, "Layers and lengths"), data.sets.length > 0 && el("a", { href: "#utterances" }, "Utterances")));
data.sets.forEach((shown, i) => page.append(
  el("h2", { id: i ? null : "models" }, `Models on ${shown.split}`),
  el("p", { class: "soft" }, `${plural(shown.num_utterances, "utterance")}, ${plural(shown.models[0].words, "word")}${shown.audio_s ? `, ${fixed(shown.audio_s / 60, 1)} minutes` : ""}; texts as ${shown.normaliser}${shown.manifest_hash ? `; manifest ${shown.manifest_hash}` : ""}. Intervals by bootstrap over utterances, differences paired; bold where an interval excludes 0.`),
  modelTable(shown)));
if (data.runs.length) page.append(...runSection().flat(Infinity).filter(Boolean));
if (data.figures.length) {
  page.append(el("div", { id: "layers" }), ...data.figures.flatMap((figure) => [el("h2", {}, `${FIGURE_TITLES[figure.kind]}: ${figure.name}`), FIGURES[figure.kind](figure)]).flat(Infinity));
}
if (data.sets.length) page.append(el("div", { id: "utterances" }), ...data.sets.flatMap(utteranceList).filter(Boolean));
