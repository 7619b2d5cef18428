"use strict";
(() => {
  const { make, draw, button, say, number, signed, clipView, switcher, rows: ratingsTable, isPlaying } = Listen;
  const EVERY = 2000; // milliseconds between two looks at the runs
  const byId = (id) => document.getElementById(id);
  const PANELS = [ // the first metric is a solid line, the second a dashed one
    { title: "Reward", of: [["reward/mean", "mean of the iteration"], ["held_out/reward", "held-out prompts"]], band: "reward/std" },
    { title: "Judge", note: "a second score, not optimised", of: [["held_out/judge", "held-out prompts"]] },
    { title: "KL to the base", note: "nats per token", of: [["policy/kl", "k3, of the iteration"], ["held_out/kl", "held-out prompts"]] },
    { title: "Variety", note: "effective number of different held-out pieces", of: [["held_out/vendi", "Vendi score of the notes"], ["held_out/vendi_audio", "of the audio"]] },
    { title: "Variety within a prompt", note: "from 1 to 4", of: [["held_out/vendi_within", "Vendi score of the notes"]] },
    { title: "Length", note: "tokens per completion", of: [["completions/length", "mean of the iteration"]] },
    { title: "Loss", note: "nats per token", of: [["loss", "training"], ["validation_loss", "validation"]] },
  ];

  // --- What is known of the server -----------------------------------------------------------------------------------

  class Refused extends Error {}
  async function ask(path) {
    const answer = await fetch(path, { cache: "no-store", headers: { "x-watch": "page" } });
    if (answer.status === 204) throw new Refused(answer.headers.get("x-watch")); // not there, or no longer
    if (!answer.ok) throw new Refused(await answer.text());
    return answer;
  }
  const read = async (path) => (await ask(path)).json();
  const at = (run, ...more) => ["/runs", run, ...more].map((part, place) => (place === 0 ? part : encodeURIComponent(part))).join("/");

  let runs = [];
  let selected = null;
  let compared = [];
  let more = "";
  const known = new Map(); // run -> { metrics: {version, rows, changed}, config, changed }
  const of = (run) => {
    if (!known.has(run)) known.set(run, { version: "", rows: [], config: {}, changed: {} });
    return known.get(run);
  };
  const shown = () => [selected, ...compared.filter((name) => name !== selected)].slice(0, 6);

  function remember() {
    const parts = new URLSearchParams({ run: selected });
    compared.forEach((name) => parts.append("with", name));
    history.replaceState(null, "", "#" + parts);
  }
  const begun = new URLSearchParams(location.hash.slice(1));

  // --- The list of runs ------------------------------------------------------------------------------------------------

  const ago = (seconds) => (seconds < 60 ? `${seconds} s ago` : seconds < 5400 ? `${Math.round(seconds / 60)} min ago`
    : seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`);
  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const lines = new Map();

  function line(name) {
    if (lines.has(name)) return lines.get(name);
    const pick = button(name, `Show ${name}`, () => select(name));
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      compared = compared.filter((each) => each !== name).concat(box.checked ? [name] : []);
      remember();
      look();
    });
    const label = make("label", {}, box);
    box.setAttribute("aria-label", `Compare with ${name}`);
    const cells = ["step", "reward", "age"].map(() => make("td"));
    const made = { pick, box, cells, row: make("tr", {}, make("th", { scope: "row" }, pick), ...cells, make("td", {}, label)) };
    lines.set(name, made);
    return made;
  }

  function list() {
    byId("empty").textContent = runs.length ? "" : "There is no run yet. It will appear here as soon as it begins.";
    byId("runs").hidden = !runs.length;
    for (const [name, { row }] of lines) {
      if (!runs.some((run) => run.name === name)) { row.remove(); lines.delete(name); known.delete(name); }
    }
    const body = byId("runs").tBodies[0];
    runs.forEach((run, place) => {
      const { pick, box, cells, row } = line(run.name);
      put(cells[0], run.step === null ? "not yet" : `${run.step}${run.total === null ? "" : ` of ${run.total}`}`);
      put(cells[1], run.reward === null ? "" : number(run.reward));
      put(cells[2], (run.finished ? "finished, " : "") + ago(run.age));
      pick.setAttribute("aria-pressed", String(run.name === selected));
      box.checked = compared.includes(run.name) && run.name !== selected;
      box.disabled = run.name === selected;
      if (!row.isConnected) body.insertBefore(row, body.rows[place] || null);
    });
  }

  function select(name) {
    if (name === selected) return;
    selected = name;
    clearPieces();
    clearCompletions();
    of(name).changed = {};
    remember();
    byId("run").hidden = false;
    put(byId("name"), name);
    document.title = name;
    put(byId("whose"), name);
    look();
  }

  // --- Curves ----------------------------------------------------------------------------------------------------------

  const WIDE = 360, HIGH = 200, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
  function ticks(low, high, most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
    const found = [];
    for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + 1e-9 * step; tick += 1) found.push(tick * step);
    return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  }
  const short = (value) => (Math.abs(value) >= 1000 || value === 0 || Number.isInteger(value) ? String(Math.round(value))
    : Math.abs(value) < 0.001 ? value.toExponential(1) : Number(value.toPrecision(3)).toString());

  const figures = new Map();
  function figure(title) {
    if (figures.has(title)) return figures.get(title);
    const svg = draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", tabindex: "0" }, document.createDocumentFragment());
    const made = { svg, what: make("p", { className: "what" }), readout: make("p", { className: "readout" }), place: null, steps: [] };
    made.node = make("figure", { className: "chart" }, make("figcaption", {}, title), made.what, svg, made.readout);
    const go = (place) => { made.place = place; made.point(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const step = ((event.clientX - box.left) / box.width * WIDE - LEFT) / (WIDE - LEFT - RIGHT) * made.last;
      const near = made.steps.reduce((best, each, place) => (Math.abs(each - step) < Math.abs(made.steps[best] - step) ? place : best), 0);
      go(near);
    });
    svg.addEventListener("pointerleave", () => go(null));
    svg.addEventListener("blur", () => go(null));
    svg.addEventListener("keydown", (event) => {
      const end = made.steps.length - 1;
      const now = made.place === null ? end : made.place;
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: end }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      go(Math.min(Math.max(to, 0), end));
      say(made.readout.textContent);
    });
    figures.set(title, made);
    return made;
  }

  function chart(panel) {
    const curves = shown().flatMap((name, run) => panel.of.map(([key, words], nth) => ({
      name, run, key, words, nth,
      points: of(name).rows.filter((row) => typeof row[key] === "number").map((row) => [row.step, row[key], nth ? null : row[panel.band] ?? null]),
    }))).filter((curve) => curve.points.length);
    if (!curves.length) return null;
    const made = figure(panel.title);
    const { svg } = made;
    const values = curves.flatMap((curve) => curve.points.flatMap(([, y, spread]) => (spread === null ? [y] : [y - spread, y + spread])));
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { low -= Math.abs(low) * 0.05 || 0.5; high += Math.abs(high) * 0.05 || 0.5; }
    [low, high] = [low - 0.04 * (high - low), high + 0.04 * (high - low)];
    const last = Math.max(1, ...curves.map((curve) => curve.points[curve.points.length - 1][0]));
    const x = (step) => LEFT + step / last * (WIDE - LEFT - RIGHT);
    const y = (value) => TOP + (high - value) / (high - low) * (HIGH - TOP - BOTTOM);
    svg.replaceChildren();
    const down = ticks(low, high, 4), along = ticks(0, last, 5);
    for (const tick of down.found) {
      draw("line", { class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: y(tick), y2: y(tick) }, svg);
      draw("text", { x: LEFT - 5, y: y(tick) + 4, "text-anchor": "end" }, svg).textContent = tick.toFixed(Math.min(down.digits, 6));
    }
    for (const tick of along.found.filter(Number.isInteger)) {
      draw("text", { x: x(tick), y: HIGH - 6, "text-anchor": tick > 0.95 * last ? "end" : "middle" }, svg).textContent = tick;
    }
    for (const { run, nth, points } of curves) {
      const colour = `var(--run-${run})`;
      const path = (all) => all.map(([a, b], place) => `${place ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
      if (points[0][2] !== null) {
        const up = points.map(([a, b, spread]) => [a, b + (spread || 0)]), under = points.map(([a, b, spread]) => [a, b - (spread || 0)]);
        draw("path", { class: "band", d: path([...up, ...under.reverse()]) + "Z" }, svg).style.fill = colour;
      }
      draw("path", { class: nth ? "curve other" : "curve", d: path(points) }, svg).style.stroke = colour;
      if (points.length < 40) points.forEach(([a, b]) => { draw("circle", { cx: x(a), cy: y(b), r: 2.2 }, svg).style.fill = colour; });
    }
    const here = draw("line", { class: "here", y1: TOP, y2: HIGH - BOTTOM, x1: 0, x2: 0, visibility: "hidden" }, svg);
    made.last = last;
    made.steps = [...new Set(curves.flatMap((curve) => curve.points.map(([step]) => step)))].sort((a, b) => a - b);
    const names = new Set(curves.map((curve) => curve.name)).size > 1;
    made.point = () => {
      const place = made.place === null ? made.steps.length - 1 : Math.min(made.place, made.steps.length - 1);
      const step = made.steps[place];
      here.setAttribute("visibility", made.place === null ? "hidden" : "visible");
      here.setAttribute("x1", x(step));
      here.setAttribute("x2", x(step));
      const found = curves.map((curve) => {
        const point = curve.points.filter(([each]) => each <= step).pop();
        const many = panel.of.length > 1 ? `${curve.words} ` : "";
        return point && `${names ? `${curve.name}: ` : ""}${many}${short(point[1])}${point[2] === null ? "" : ` ± ${short(point[2])}`}${point[0] === step ? "" : ` at ${point[0]}`}`;
      }).filter(Boolean);
      put(made.readout, `Iteration ${step}: ${found.join("; ")}`);
    };
    made.point();
    const lineKinds = [...new Set(curves.map((curve) => curve.nth))].map((nth) => panel.of[nth][1] + (nth ? " (dashed)" : ""));
    put(made.what, [panel.note, lineKinds.join(", ")].filter(Boolean).join("; "));
    svg.setAttribute("aria-label", `${panel.title}, iterations ${made.steps[0]} to ${last}. ${made.readout.textContent}. Arrow keys read it.`);
    return made.node;
  }

  function curves() {
    const keys = [...new Set(shown().flatMap((name) => of(name).rows.slice(-50).flatMap(Object.keys)))].filter((key) => key !== "step").sort();
    const choose = byId("more");
    if ([...choose.options].slice(1).map((each) => each.value).join() !== keys.join()) {
      choose.replaceChildren(make("option", { value: "" }, "none"), ...keys.map((key) => make("option", { value: key }, key)));
      choose.value = keys.includes(more) ? more : "";
    }
    const panels = [...PANELS, ...(more ? [{ title: more, of: [[more, more]] }] : [])];
    const nodes = panels.map(chart).filter(Boolean);
    const box = byId("charts");
    if (nodes.length !== box.children.length || nodes.some((node, place) => node !== box.children[place])) {
      box.replaceChildren(...(nodes.length ? nodes : [make("p", { className: "note" }, "No metrics have been written yet.")]));
    }
    const legend = shown().length > 1 ? shown().map((name, run) => {
      const swatch = make("i", { className: "swatch" });
      swatch.style.background = `var(--run-${run})`;
      return make("span", {}, swatch, name);
    }) : [];
    byId("legend").replaceChildren(...legend);
  }
  byId("more").addEventListener("change", () => { more = byId("more").value; curves(); });

  // --- Pieces ----------------------------------------------------------------------------------------------------------

  const blob = (path) => async () => URL.createObjectURL(await (await ask(path)).blob());
  const files = (paths, label) => make("div", { className: "row" }, ...paths.map(([kind, href]) => {
    const link = make("a", { className: "to-file", href, download: "" }, kind);
    link.setAttribute("aria-label", `Save ${label} as ${kind}`);
    return link;
  }));
  const view = (clips, make1) => {
    const pitches = clips.flatMap((clip) => clip.notes.map((note) => note[2]));
    const range = [Math.min(48, ...pitches), Math.max(72, ...pitches)];
    const span = Math.max(...clips.map((clip) => clip.seconds || 0), 0.1);
    return clips.map((clip, side) => make1(clip, side, span, range));
  };
  const words = (name) => {
    const [kind, step] = name.split("/");
    return kind === "final" ? "the end: base and tuned model" : kind === "held_out"
      ? `iteration ${Number(step)}: base and policy` : `iteration ${Number(step)}: from the batch`;
  };

  let sets = [], set = null, follows = true; // the set that is shown; whether a newer one takes its place
  const stop = (box) => box.querySelectorAll(".clip").forEach((clip) => clip.stop && clip.stop());
  function clearPieces() {
    stop(byId("pairs"));
    byId("pairs").replaceChildren();
    sets = []; set = null; follows = true;
    byId("sets-row").hidden = true;
    byId("no-pieces").hidden = false;
  }

  async function pieces(run) {
    sets = await read(at(run, "sets"));
    const choose = byId("sets");
    if (run !== selected) return;
    choose.replaceChildren(...sets.map((name) => make("option", { value: name }, words(name))));
    byId("sets-row").hidden = !sets.length;
    byId("no-pieces").hidden = sets.length > 0;
    if (!sets.includes(set)) { set = null; follows = true; }
    const wanted = set === null || (follows && !(isPlaying() && byId("pairs").querySelector("audio[src]"))) ? sets[0] : set;
    choose.value = wanted || "";
    if (wanted && wanted !== set) await showSet(run, wanted);
    if (!wanted) clearPieces();
  }

  async function showSet(run, wanted) {
    const found = await read(at(run, "sets") + "/" + wanted);
    if (run !== selected) return;
    const box = byId("pairs");
    const focus = [...box.querySelectorAll("button, input, a")].indexOf(document.activeElement);
    stop(box);
    box.replaceChildren(...found.pairs.map((pair) => {
      const where = `prompt ${pair.number}`;
      const heads = pair.clips.map((clip) => clip.label);
      const views = view(pair.clips, (clip, side, span, range) => {
        const path = (kind) => `${at(run, "pieces")}/${clip.folder}/${clip.file}.${kind}`;
        return clipView({
          clip, span, range, where, hidden: false, role: side === pair.clips.length - 1 ? "other" : "first", label: clip.label,
          source: blob(path("wav")),
          downloads: files([["MIDI", path("mid")], ...(clip.audio ? [["WAV", path("wav")]] : [])], `${clip.label}, ${where},`),
        });
      });
      const rated = [...new Set(pair.clips.flatMap((clip) => Object.keys(clip.ratings)))];
      const axes = rated.length === 2 ? rated.filter((axis) => axis !== "reward") : rated; // one axis is the reward
      const lines = axes.map((axis) => {
        const found = pair.clips.map((clip) => clip.ratings[axis] ?? null);
        const both = found.length === 2 && !found.includes(null);
        return [axis, ...found.map(number), ...(found.length === 2 ? [both ? signed(found[1] - found[0]) : "none"] : [])];
      });
      const table = ratingsTable("Ratings", ["Axis", ...heads, ...(heads.length === 2 ? ["Difference"] : [])], lines);
      const node = make("article", { className: "pair" }, make("h4", {}, `Prompt ${pair.number}`), ...[switcher(views, where)].filter(Boolean),
        make("div", { className: heads.length === 1 ? "clips alone" : "clips" }, ...views), ...(axes.length ? [table] : []));
      node.setAttribute("aria-label", `Prompt ${pair.number}`);
      return node;
    }));
    if (set !== null && follows) say(`New pieces: ${words(wanted)}.`);
    set = wanted;
    if (focus >= 0) ([...box.querySelectorAll("button, input, a")][focus] || byId("sets")).focus();
  }
  byId("sets").addEventListener("change", () => {
    const wanted = byId("sets").value;
    follows = wanted === sets[0];
    showSet(selected, wanted).catch(trouble);
  });

  // --- Completions -----------------------------------------------------------------------------------------------------

  let steps = [], step = null, newest = true, table = [], order = ["reward", -1];
  const details = new Map(); // row -> the opened clip
  function closeDetails() {
    details.forEach((node) => { stop(node); node.remove(); });
    details.clear();
  }
  function clearCompletions() {
    closeDetails();
    steps = []; step = null; newest = true; table = [];
    byId("steps-row").hidden = byId("table-box").hidden = true;
    byId("no-completions").hidden = false;
  }

  async function completions(run) {
    const found = await read(at(run, "completions"));
    if (run !== selected) return;
    steps = found.reverse();
    byId("steps").replaceChildren(...steps.map((each) => make("option", { value: each }, String(each))));
    byId("steps-row").hidden = !steps.length;
    byId("no-completions").hidden = steps.length > 0;
    if (!steps.includes(step)) { step = null; newest = true; }
    const wanted = step === null || (newest && !details.size) ? steps[0] : step;
    if (wanted === undefined) { clearCompletions(); return; }
    byId("steps").value = wanted;
    if (wanted !== step) await showStep(run, wanted);
  }

  async function showStep(run, wanted) {
    byId("table-box").setAttribute("aria-busy", "true");
    const found = await read(at(run, "completions", wanted));
    byId("table-box").removeAttribute("aria-busy");
    if (run !== selected) return;
    closeDetails();
    step = wanted;
    table = found;
    byId("table-box").hidden = false;
    tabulate();
  }
  byId("steps").addEventListener("change", () => {
    const wanted = Number(byId("steps").value);
    newest = wanted === steps[0];
    showStep(selected, wanted).catch(trouble);
  });

  function tabulate() {
    const axes = table.length ? Object.keys(table[0].ratings).filter((key) => !["reward", "advantage", "group"].includes(key)) : [];
    const columns = [["reward", "Reward"], ...(axes.length > 1 ? axes.map((axis) => [axis, axis]) : []), ["advantage", "Advantage"],
      ["group", "Prompt"], ["length", "Tokens"]];
    const value = (row, key) => (key === "length" ? row.length : row.ratings[key] ?? null);
    const [by, way] = order;
    const sorted = [...table].sort((a, b) => {
      const [one, two] = [value(a, by), value(b, by)];
      if (one === null || two === null) return (one === null) - (two === null); // those without a rating are last
      return way * (one - two) || a.row - b.row;
    });
    const head = make("tr", {}, make("th", { scope: "col" }, "Play"), ...columns.map(([key, text]) => {
      const node = make("th", { scope: "col" }, button(`${text}${key === by ? (way < 0 ? " ▼" : " ▲") : ""}`, `Sort by ${text}`, () => {
        order = [key, key === by ? -way : key === "group" ? 1 : -1];
        tabulate();
        byId("completions").querySelector(`[aria-label="Sort by ${text}"]`).focus();
      }));
      node.setAttribute("aria-sort", key === by ? (way < 0 ? "descending" : "ascending") : "none");
      return node;
    }));
    byId("completions").tHead.replaceChildren(head);
    byId("completions").tBodies[0].replaceChildren(...sorted.flatMap((row) => {
      const open = button("Play", `Play completion ${row.row}`, () => toggle(row, columns.length + 1, line, open));
      open.setAttribute("aria-expanded", String(details.has(row.row)));
      const cells = columns.map(([key]) => {
        if (key === "group") return make("td", { title: row.tokens }, `${row.ratings.group}: ${row.prompt}`);
        const text = value(row, key) === null ? "none" : key === "length" ? String(row.length) : key === "advantage" ? signed(value(row, key)) : number(value(row, key));
        return make("td", { className: "number" }, text);
      });
      const line = make("tr", {}, make("td", {}, open), ...cells);
      return details.has(row.row) ? [line, details.get(row.row)] : [line];
    }));
  }

  async function toggle(row, wide, line, open) {
    if (details.has(row.row)) {
      stop(details.get(row.row));
      details.get(row.row).remove();
      details.delete(row.row);
      open.setAttribute("aria-expanded", "false");
      return;
    }
    const cell = make("td", { colSpan: wide }, make("p", { className: "note" }, "Rendering …"));
    const detail = make("tr", { className: "detail" }, cell);
    details.set(row.row, detail);
    open.setAttribute("aria-expanded", "true");
    line.after(detail);
    const path = (kind) => `${at(selected, "completions", step, row.row)}.${kind}`;
    const [run, of_step] = [selected, step];
    try {
      const clip = await read(path("json"));
      if (run !== selected || of_step !== step || !details.has(row.row)) return;
      const label = `Completion ${row.row}`;
      const [node] = view([clip], (_, side, span, range) => clipView({
        clip, span, range, where: `iteration ${step}`, hidden: false, role: "other", label,
        source: blob(path("wav")), downloads: files([["MIDI", path("mid")], ["WAV", path("wav")]], label),
      }));
      cell.replaceChildren(node);
      node.querySelector("button.play").click();
    } catch (error) {
      put(cell, error.message);
    }
  }

  // --- Configuration -----------------------------------------------------------------------------------------------------

  const flat = (value, prefix = "") => Object.entries(value).flatMap(([key, each]) =>
    (each && typeof each === "object" && !Array.isArray(each) && Object.keys(each).length ? flat(each, `${prefix}${key}.`)
      : [[prefix + key, typeof each === "string" ? each : JSON.stringify(each)]]));

  function configuration() {
    const names = shown();
    const all = names.map((name) => new Map(flat(of(name).config)));
    const keys = [...new Set(all.flatMap((each) => [...each.keys()]))].sort();
    const text = (value) => (value === undefined ? "not set" : value === "" ? "empty" : value);
    const grid = (caption, heads, lines) => {
      const node = ratingsTable(caption, heads, lines);
      node.className = "differs";
      return node;
    };
    const differing = keys.filter((key) => new Set(all.map((each) => each.get(key))).size > 1);
    const about = names.length < 2 ? make("p", { className: "note" }, "Tick other runs above to see how their settings differ.")
      : differing.length ? grid(`Settings that differ (${differing.length})`, ["Setting", ...names],
        differing.map((key) => [key, ...all.map((each) => text(each.get(key)))])) : make("p", {}, "These runs have the same settings.");
    byId("differences").replaceChildren(about);
    byId("settings").replaceChildren(grid("", ["Setting", "Value"], [...all[0]].map(([key, value]) => [key, text(value)])));
  }

  // --- Looking again -----------------------------------------------------------------------------------------------------

  const same = (one, two) => JSON.stringify(one) === JSON.stringify(two);
  function trouble(error) {
    if (!(error instanceof Refused || error instanceof TypeError)) throw error;
    put(byId("problem"), error instanceof Refused ? error.message : "The server does not answer. This page goes on trying.");
  }

  async function renew() {
    const answer = await read("/runs");
    runs = answer.runs;
    put(byId("folder"), answer.folder);
    const there = new Set(runs.map((run) => run.name));
    compared = compared.filter((name) => there.has(name));
    let problem = "";
    if (selected !== null && !there.has(selected)) {
      problem = `${selected} is no longer there.`;
      say(problem);
      selected = null;
      byId("run").hidden = true;
      clearPieces();
      clearCompletions();
    }
    if (selected === null && runs.length) {
      const wanted = begun.get("run");
      compared = begun.getAll("with").filter((name) => there.has(name));
      begun.delete("with");
      select(there.has(wanted) ? wanted : runs[0].name);
    }
    list();
    if (selected === null) { put(byId("problem"), problem); return; }
    let drawn = false, configured = false;
    for (const name of shown()) {
      const now = runs.find((run) => run.name === name).changed, mine = of(name);
      if (!same(mine.changed.metrics, now.metrics)) {
        const found = await read(`${at(name, "metrics")}?version=${mine.version}&seen=${mine.rows.length}`);
        mine.rows = found.first ? mine.rows.slice(0, found.first).concat(found.rows) : found.rows;
        mine.version = found.version;
        mine.changed.metrics = now.metrics;
        drawn = true;
      }
      if (!same(mine.changed.config, now.config)) {
        mine.config = await read(at(name, "config"));
        mine.changed.config = now.config;
        configured = true;
      }
    }
    const who = shown().join("\n");
    if (drawn || who !== renew.who) curves();
    if (configured || who !== renew.who) configuration();
    renew.who = who;
    const run = selected, mine = of(run), now = runs.find((each) => each.name === run).changed;
    if (!same(mine.changed.sets, now.sets) || (follows && set !== sets[0])) { await pieces(run); mine.changed.sets = now.sets; }
    if (!same(mine.changed.completions, now.completions) || (newest && step !== steps[0] && !details.size)) {
      await completions(run);
      mine.changed.completions = now.completions;
    }
    put(byId("problem"), problem);
  }

  let busy = false, again = false, timer = 0;
  async function look() { // now, or once more as soon as the look that is under way has ended
    if (busy) { again = true; return; }
    clearTimeout(timer);
    busy = true;
    try {
      do { again = false; await renew(); } while (again);
    } catch (error) {
      trouble(error);
    } finally {
      busy = false;
      if (!document.hidden) timer = setTimeout(look, EVERY);
    }
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  look();
})();
