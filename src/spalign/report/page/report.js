"use strict";
// Everything that a model or a user wrote goes through textContent; nothing is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined).map((c) => (typeof c === "number" ? String(c) : c)));
  return node;
};
const svg = (tag, attributes = {}, text = null) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
};
const number = (v, digits = 2) => (v === null || v === undefined ? "-" : Number(v).toFixed(digits));
const signed = (v, digits = 2) => (v > 0 ? "+" : "") + number(v, digits);
const percent = (v) => `${(100 * v).toFixed(1)}%`;
const main = document.getElementById("main");

// verdict
function verdict() {
  const s = data.summary;
  if (!s) {
    main.append($("div", { class: "verdict" }, $("p", {}, "This run is not finished: there is no verdict yet.")));
    return;
  }
  const gate = s.gate;
  const box = $("div", { class: `verdict ${gate.passed ? "good" : "bad"}` });
  box.append(
    $("p", {}, $("strong", { class: gate.passed ? "good" : "bad" }, gate.passed ? "Priority gate passed. " : `Priority gate: ${gate.verdict}. `), gate.text),
    $("p", {}, s.model_path ? `Handed over: ${s.model_path}` : `Nothing is handed over; the model that failed is kept: ${gate.failed_path}`),
  );
  const rose = [], fell = [];
  for (const [measure, slices] of Object.entries(s.measures)) {
    for (const slice of ["all", "safe", "unsafe"]) {
      const d = slices[slice]?.difference;
      if (!d) continue;
      const told = `${measure} (${slice}) ${signed(d.mean)} [${signed(d.ci[0])}, ${signed(d.ci[1])}]`;
      if (d.ci[0] > 0) rose.push(told);
      if (d.ci[1] < 0) fell.push(told);
    }
  }
  box.append(
    $("p", {}, $("strong", {}, "Rose beyond chance: "), rose.join("; ") || "nothing"),
    $("p", {}, $("strong", {}, "Fell beyond chance: "), fell.join("; ") || "nothing"),
  );
  const failing = s.checks.filter((c) => !c.passed).map((c) => `${c.name} (${c.text})`);
  if (failing.length) box.append($("p", {}, $("strong", { class: "bad" }, "Checks that fail: "), failing.join("; ")));
  box.append($("p", { class: s.judge.independent ? "" : "warn" }, s.judge.independent
    ? `Judged by ${s.judge.model}, which is not the policy.`
    : "Judged by the untrained policy itself: this shows what was learned, not that it is right."));
  for (const [objective, how] of Object.entries(s.judge.objectives)) {
    const known = how.auc === null ? "never checked on labelled answers"
      : `AUC ${number(how.auc)} [${number(how.auc_ci[0])}, ${number(how.auc_ci[1])}] on labelled answers (${how.on}): ${how.verdict}`;
    box.append($("p", { class: how.verdict === "trustworthy" ? "" : "warn" }, `Judge of ${objective}: ${how.scorer}, ${known}`));
  }
  main.append(box);
  main.append($("h2", {}, "Before and after"), $("div", { class: "scroll" }, measures(s.measures)));
  main.append($("h2", {}, "Checks"));
  for (const c of s.checks) main.append($("div", {}, $("strong", { class: c.passed ? "good" : "bad" }, c.passed ? "ok " : "FAIL "), `${c.name}: ${c.text}`));
}
function measures(all) {
  const body = $("tbody");
  for (const [measure, slices] of Object.entries(all)) {
    const show = ["refusal", "repetition", "finished"].includes(measure) ? percent : (v) => number(v);
    for (const [slice, by] of Object.entries(slices)) {
      if (slice === "ill_meant") continue; // stands there as unsafe
      const [low, high] = by.difference.ci;
      const sure = low > 0 || high < 0, kind = !sure ? "" : data.objectives.includes(measure) ? (low > 0 ? "good" : "bad") : "sure";
      body.append($("tr", {}, $("td", {}, slice === "all" ? measure : ""), $("td", {}, slice), $("td", { class: "n" }, show(by.before.mean)),
        $("td", { class: "n" }, show(by.after.mean)), $("td", { class: `n ${kind}` }, `${show(by.difference.mean)} [${show(low)}, ${show(high)}]`)));
    }
  }
  const head = ["measure", "prompts", "before", "after", "difference, 95%"].map((h, i) => $("th", { class: i > 1 ? "n" : "" }, h));
  return $("table", {}, $("thead", {}, $("tr", {}, ...head)), body);
}

// charts
const W = 360, H = 244, L = 38, B = 38;
function frame(xs, ys, xlabel, ylabel) {
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  const [x0, x1] = xs, [y0, y1] = ys;
  const x = (v) => L + ((v - x0) / (x1 - x0 || 1)) * (W - L - 8), y = (v) => H - B - ((v - y0) / (y1 - y0 || 1)) * (H - B - 8);
  root.append(svg("line", { x1: L, y1: H - B, x2: W - 8, y2: H - B, class: "axis" }), svg("line", { x1: L, y1: 8, x2: L, y2: H - B, class: "axis" }));
  for (let i = 0; i <= 4; i++) {
    const vx = x0 + ((x1 - x0) * i) / 4, vy = y0 + ((y1 - y0) * i) / 4;
    root.append(svg("text", { x: x(vx), y: H - 24, "text-anchor": i === 4 ? "end" : "middle" }, short(vx)), svg("text", { x: L - 4, y: y(vy) + 4, "text-anchor": "end" }, short(vy)));
  }
  root.append(svg("text", { x: (L + W) / 2, y: H - 8, "text-anchor": "middle" }, xlabel), svg("text", { x: L + 4, y: 14 }, ylabel));
  return { root, x, y };
}
const short = (v) => (Math.abs(v) >= 1000 || (v !== 0 && Math.abs(v) < 0.01) ? v.toExponential(0) : String(Math.round(v * 100) / 100));
const range = (values) => { let a = Infinity, b = -Infinity; for (const v of values) { if (v < a) a = v; if (v > b) b = v; } return a > b ? [0, 1] : a === b ? [a - 0.5, b + 0.5] : [a, b]; };
function figure(title, node, keys = []) {
  const marks = keys.map(([name, kind]) => { const k = svg("svg", { viewBox: "0 0 10 10" }); k.append(svg("circle", { cx: 5, cy: 5, r: 4, class: `s${kind}` })); return $("span", { class: "key" }, k, name); });
  return $("figure", {}, node, $("figcaption", {}, title, $("br"), ...marks));
}
function scatter(title, groups, xlabel, ylabel) {
  const { root, x, y } = frame([0, 10], [0, 10], xlabel, ylabel);
  for (const [, kind, points] of groups) for (const [a, b] of points) root.append(svg("circle", { cx: x(a).toFixed(1), cy: y(b).toFixed(1), r: 2.4, class: `dot s${kind}` }));
  return figure(title, root, groups.map(([name, kind, points]) => [`${name} (${points.length})`, kind]));
}
function histogram(title, values, xlabel, mark = null, log = false) {
  const shown = log ? values.filter((v) => v > 0).map(Math.log10) : values;
  const [low, high] = range(shown), bins = 24, counts = Array(bins).fill(0);
  for (const v of shown) counts[Math.min(bins - 1, Math.floor(((v - low) / (high - low)) * bins))]++;
  const { root, x, y } = frame([low, high], [0, Math.max(1, ...counts)], log ? `log10 ${xlabel}` : xlabel, "how many");
  counts.forEach((n, i) => { if (n) root.append(svg("rect", { x: x(low + ((high - low) * i) / bins) + 0.5, y: y(n), width: (W - L - 8) / bins - 1, height: H - B - y(n), class: "s0" })); });
  if (mark !== null) { const at = log ? Math.log10(mark) : mark; if (at >= low && at <= high) root.append(svg("line", { x1: x(at), y1: 8, x2: x(at), y2: H - B, class: "mark" })); }
  return figure(title, root);
}
function curves(title, series, xlabel) {
  const points = series.flatMap(([, , p]) => p);
  const { root, x, y } = frame(range(points.map((p) => p[0])), range(points.map((p) => p[1])), xlabel, "");
  for (const [, kind, p] of series) root.append(svg("polyline", { points: p.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), class: `line s${kind}` }));
  return figure(title, root, series.map(([name, kind]) => [name, kind]));
}
function bars(rows) {
  const most = Math.max(1, ...rows.map((r) => r[1]));
  return $("div", {}, ...rows.map(([name, n, kind]) => {
    const root = svg("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none" });
    root.append(svg("rect", { x: 0, y: 0, width: (100 * n) / most, height: 12, class: `s${kind}` }));
    return $("div", { class: "bar" }, $("span", {}, name), root, $("span", { class: "dim" }, n.toLocaleString("en")));
  }));
}
function iterations() {
  data.iterations.forEach((it, i) => {
    const title = data.iterations.length > 1 ? `, iteration ${i + 1}` : "";
    if (it.funnel) {
      const f = it.funnel;
      main.append($("h2", {}, `Funnel${title}`), bars([["prompts in", f.prompts, 3], ...Object.entries(f.dropped).map(([why, n]) => [`dropped: ${why}`, n, 1]), ["prompts kept", f.kept, 2]]));
      main.append($("p", { class: "dim" }, `${f.pairs.toLocaleString("en")} pairs; decided by ${Object.entries(f.decided_by).map(([o, n]) => `${o} ${n}`).join(", ") || "nothing"}; the winner is the shorter one in ${f.winner_shorter}. ` +
        `Of ${f.responses.candidates.toLocaleString("en")} candidates ${f.responses.unfinished} were cut off and ${f.responses.empty} empty. ${it.consistency || ""}`));
    }
    const charts = $("div", { class: "charts" });
    const [first, second] = data.objectives;
    if (second && it.plane.length) charts.append(scatter(`Scores of the answers trained from${it.sampled ? `, ${it.sampled}` : ""}`, it.plane, first, second));
    if (it.dets.length) charts.append(histogram(`det(Sigma) of the prompts' candidates${it.tau !== null ? `; dashed: tau = ${short(it.tau)}` : ""}`, it.dets, "det", it.tau, true));
    if (it.margins.length) charts.append(histogram("Margins of the pairs", it.margins, "score points"), histogram("Weights of the pairs (Eq. 3)", it.weights, "weight"));
    if (it.steps.length > 1) {
      const line = (key) => it.steps.filter((s) => typeof s[key] === "number").map((s) => [s.step, s[key]]);
      charts.append(curves("Loss", [["loss", 0, line("loss")]], "step"), curves("Log-probability a token", [["chosen", 2, line("logps/chosen")], ["rejected", 1, line("logps/rejected")]], "step"));
      charts.append(curves("Pairs in which the chosen answer is the likelier one", [["share", 0, line("pairs/accuracy")]], "step"));
    }
    if (charts.childElementCount) main.append($("h2", {}, `Data and training${title}`), charts);
    if (it.collapsed) main.append($("p", { class: "bad" }, `Training stopped: ${it.collapsed}`));
  });
  const [first, second] = data.objectives;
  if (second && data.heldout.length) {
    main.append($("h2", {}, "Held-out answers"), $("div", { class: "charts" }, scatter("Before", [data.heldout[0]], first, second), scatter("After", [data.heldout[1]], first, second)));
  }
}
function cost() {
  if (!data.cost.length) return;
  const rows = data.cost.map(([stage, seconds, tokens]) => $("tr", {}, $("td", {}, stage), $("td", { class: "n" }, number(seconds, 1)), $("td", { class: "n" }, tokens ? tokens.toLocaleString("en") : "-")));
  const head = ["stage", "seconds", "tokens generated"].map((h, i) => $("th", { class: i ? "n" : "" }, h));
  main.append($("h2", {}, "Cost"), $("div", { class: "scroll" }, $("table", {}, $("thead", {}, $("tr", {}, ...head)), $("tbody", {}, ...rows))));
}

// prompts: an index that is always there, texts in chunks that are parsed when they are looked at
const chunks = new Map();
function details(i) {
  const n = Math.floor(i / data.chunk);
  if (!chunks.has(n)) chunks.set(n, JSON.parse(document.getElementById(`chunk-${n}`).textContent));
  return chunks.get(n)[i % data.chunk];
}
function browser() {
  const PAGE = 200;
  let found = [], shown = 0, current = -1;
  const search = $("input", { type: "search", placeholder: "Search prompts and answers ( / )", "aria-label": "Search", id: "search" });
  const select = (label, values) => $("select", { "aria-label": label }, $("option", { value: "" }, label), ...values.map((v) => $("option", { value: v }, v || "(none)")));
  const distinct = (key) => [...new Set(data.prompts.map((p) => p[key]))].sort();
  const verdicts = select("every verdict", distinct("verdict")), intents = select("every intent", distinct("intent")), topics = select("every topic", distinct("topic"));
  const count = $("span", { class: "dim", role: "status" });
  const list = $("div", { class: "list", role: "listbox", "aria-label": "Prompts" });
  const pane = $("div", { class: "pane", tabindex: "-1", "aria-live": "polite" });
  const more = $("button", { onclick: () => draw() }, "more");
  function draw() {
    more.remove();
    for (const i of found.slice(shown, shown + PAGE)) {
      const p = data.prompts[i];
      list.append($("button", { "data-i": i, onclick: () => open(i) }, $("span", { class: "t" }, p.text), $("span", { class: "dim" }, `${p.verdict}${p.pairs ? `, ${p.pairs} pairs` : ""} · ${p.id}`)));
    }
    shown += PAGE;
    if (shown < found.length) list.append(more);
  }
  function filter() {
    const words = search.value.toLowerCase().trim();
    found = [];
    data.prompts.forEach((p, i) => {
      if ((verdicts.value && p.verdict !== verdicts.value) || (intents.value && p.intent !== intents.value) || (topics.value && p.topic !== topics.value)) return;
      if (words && !`${p.id} ${p.text}`.toLowerCase().includes(words) && !JSON.stringify(details(i)).toLowerCase().includes(words)) return;
      found.push(i);
    });
    list.replaceChildren();
    shown = 0;
    count.textContent = `${found.length.toLocaleString("en")} of ${data.prompts.length.toLocaleString("en")}`;
    draw();
  }
  function open(i) {
    current = found.indexOf(i);
    list.querySelector("[aria-current]")?.removeAttribute("aria-current");
    const button = list.querySelector(`[data-i="${i}"]`);
    button?.setAttribute("aria-current", "true");
    if (button && (button.offsetTop < list.scrollTop || button.offsetTop + button.offsetHeight > list.scrollTop + list.clientHeight)) list.scrollTop = button.offsetTop;
    pane.replaceChildren(...one(details(i)));
  }
  function step(by) {
    if (!found.length) return;
    const next = Math.min(found.length - 1, Math.max(0, current + by));
    while (next >= shown) draw();
    open(found[next]);
  }
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 150); });
  for (const s of [verdicts, intents, topics]) s.addEventListener("change", filter);
  document.addEventListener("keydown", (e) => {
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(document.activeElement.tagName);
    if (e.key === "/" && !typing) { search.focus(); e.preventDefault(); }
    else if (e.key === "Escape") document.activeElement.blur();
    else if (!typing && (e.key === "j" || (e.key === "ArrowDown" && document.activeElement.closest?.(".list")))) { step(1); e.preventDefault(); }
    else if (!typing && (e.key === "k" || (e.key === "ArrowUp" && document.activeElement.closest?.(".list")))) { step(-1); e.preventDefault(); }
  });
  main.append($("h2", { id: "prompts" }, "Prompts"), $("p", { class: "dim" }, "Keys: / search, j and k next and previous."),
    $("div", { class: "controls" }, search, verdicts, intents, topics, count), $("div", { class: "browser" }, list, pane));
  filter();
  if (found.length) open(found[0]);
}
function one(p) {
  const out = [$("h3", {}, p.id), $("div", {}, ...[p.intent, p.topic].filter(Boolean).map((t) => $("span", { class: "tag" }, t))), $("div", { class: "text" }, p.prompt)];
  const scores = (s) => Object.entries(s).map(([o, v]) => `${o} ${number(v)}`).join(", ") || "no scores";
  if (p.answers.before && p.answers.after) {
    out.push($("h3", {}, "Before and after training"));
    p.answers.before.forEach((b, n) => {
      const a = p.answers.after[n];
      out.push($("div", { class: "sides" }, $("div", {}, $("span", { class: "dim" }, `before: ${scores(b.scores)}`), $("div", { class: "text" }, b.text)),
        $("div", {}, $("span", { class: "dim" }, `after: ${a ? scores(a.scores) : ""}`), $("div", { class: "text" }, a ? a.text : ""))));
    });
  }
  for (const it of p.iterations) {
    const v = it.verdict;
    out.push($("h3", {}, `Iteration ${it.number}: `, $("span", { class: v && !v.reason ? "good" : "warn" }, v ? v.reason ? `dropped: ${v.reason}` : "kept" : "not denoised yet")));
    if (v) out.push($("p", { class: "dim" }, [v.detail, v.det === null ? "" : `det(Sigma) = ${short(v.det)}`].filter(Boolean).join("; ")));
    for (const r of it.responses) {
      out.push($("div", {}, $("span", { class: "tag" }, r.kind), $("strong", {}, `${r.name} `), $("span", { class: "dim" }, `${scores(r.scores)}${r.finished ? "" : ", cut off"}`)), $("div", { class: "text" }, r.text));
    }
    for (const q of it.pairs) out.push($("div", { class: "good" }, `${q.chosen} > ${q.rejected} `, $("span", { class: "dim" }, `margin ${number(q.margin)}, weight ${number(q.weight)}, decided by ${q.decided_by}`)));
  }
  return out;
}

verdict();
iterations();
cost();
browser();
document.body.dataset.ready = Math.round(performance.now());
