"use strict";
(() => {
  const { make, button, say, number, signed, slug, save, clipView, switcher, rows } = Listen;
  const data = JSON.parse(document.getElementById("data").textContent);

  // --- The listener's choices, stored in this browser if it allows that --------------------------------------------

  const place = "smart-demo-" + data.id;
  const empty = () => ({ blind: false, swapped: {}, choices: {}, open: {} });
  let state = empty();
  let kept = true;
  try {
    state = Object.assign(empty(), JSON.parse(localStorage.getItem(place) || "{}"));
  } catch { kept = false; }
  function keep() {
    try { localStorage.setItem(place, JSON.stringify(state)); } catch { kept = false; }
    document.getElementById("kept").textContent = kept ? ""
      : "This browser stores nothing for this page: save your choices before you close it.";
  }

  // --- Helpers -----------------------------------------------------------------------------------------------------

  // Decodes base 85 (RFC 1924, with "," for "<"): a quarter longer than the bytes, where base 64 is a third longer.
  const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
  const digit = new Uint8Array(128);
  [...alphabet].forEach((letter, value) => { digit[letter.charCodeAt(0)] = value; });
  function bytes(text) {
    const groups = Math.ceil(text.length / 5);
    const out = new DataView(new ArrayBuffer(groups * 4));
    for (let group = 0; group < groups; group += 1) {
      let value = 0;
      for (let at = group * 5; at < group * 5 + 5; at += 1) {
        value = value * 85 + (at < text.length ? digit[text.charCodeAt(at)] : 84);
      }
      out.setUint32(group * 4, value);
    }
    return out.buffer.slice(0, groups * 4 - (groups * 5 - text.length));
  }

  // --- Audio: the page has FLAC, plays it directly, and converts it to WAV for download ------------------------------

  const flac = (clip) => {
    const node = document.getElementById("audio-" + clip.audio);
    if (!node) throw new Error("the page is still loading");
    return bytes(node.textContent);
  };

  // The 16-bit samples of a clip, or null if the browser alters decoded audio. Browsers decode to floats: n / 32768,
  // or, in some, n / 32767 above zero.
  async function samples(clip) {
    const context = new OfflineAudioContext(2, 1, data.sample_rate);
    const decoded = await context.decodeAudioData(flac(clip));
    const channels = Array.from({ length: decoded.numberOfChannels }, (_, c) => decoded.getChannelData(c));
    for (const above of [32768, 32767]) {
      const exact = (value) => {
        const level = value * (value < 0 ? 32768 : above);
        return Math.abs(level - Math.round(level)) < 0.01 && level < 32767.5;
      };
      if (channels.every((channel) => channel.every(exact))) {
        const out = new Int16Array(channels.length * decoded.length);
        channels.forEach((channel, c) => channel.forEach((value, at) => {
          out[at * channels.length + c] = Math.round(value * (value < 0 ? 32768 : above));
        }));
        return { samples: out, channels: channels.length };
      }
    }
    return null;
  }

  function wav({ samples: levels, channels }) {
    const file = new DataView(new ArrayBuffer(44 + levels.length * 2));
    const text = (at, word) => [...word].forEach((letter, place) => file.setUint8(at + place, letter.charCodeAt(0)));
    text(0, "RIFF"); file.setUint32(4, 36 + levels.length * 2, true); text(8, "WAVEfmt ");
    file.setUint32(16, 16, true); file.setUint16(20, 1, true); file.setUint16(22, channels, true);
    file.setUint32(24, data.sample_rate, true); file.setUint32(28, data.sample_rate * channels * 2, true);
    file.setUint16(32, channels * 2, true); file.setUint16(34, 16, true);
    text(36, "data"); file.setUint32(40, levels.length * 2, true);
    levels.forEach((level, at) => file.setInt16(44 + at * 2, level, true));
    return file.buffer;
  }

  async function saveAudio(clip, name) {
    const decoded = await samples(clip).catch(() => null);
    if (decoded) {
      save(wav(decoded), "audio/wav", name + ".wav");
    } else {
      save(flac(clip), "audio/flac", name + ".flac");
      say("This browser does not decode audio exactly, so the FLAC file was saved instead of a WAV file.");
    }
  }

  const downloads = (clip, label, where, name) => {
    const row = make("div", { className: "row" },
      button("MIDI", `Save ${label}, ${where}, as MIDI`, () => save(bytes(clip.midi), "audio/midi", name + ".mid")));
    if (clip.audio !== null) {
      row.append(button("WAV", `Save ${label}, ${where}, as WAV`, () => saveAudio(clip, name)));
    }
    return row;
  };

  // --- Pairs ---------------------------------------------------------------------------------------------------------

  class Pair {
    constructor(section, index) {
      this.section = section;
      this.pair = section.pairs[index];
      this.where = `prompt ${this.pair.prompt}`;
      this.heard = {};
      this.node = make("article", { className: "pair" });
      this.node.setAttribute("aria-label", `Prompt ${this.pair.prompt}`);
    }
    get other() { return this.section.others[this.section.step].name; }
    get key() { return [this.section.number, this.pair.prompt, this.other].join("/"); }
    clip(name) { return data.clips[this.pair.clips[name]]; }

    show() {
      this.node.querySelectorAll(".clip").forEach((clip) => clip.stop && clip.stop());
      const { key, pair, section } = this;
      const choice = state.choices[key];
      const hidden = state.blind && !choice;
      const names = [section.first, this.other];
      const roles = ["first", "other"];
      if (state.blind) {
        if (!(key in state.swapped)) { state.swapped[key] = Math.random() < 0.5; keep(); }
        if (state.swapped[key]) { names.reverse(); roles.reverse(); }
      }
      const clips = names.map((name) => this.clip(name));
      const pitches = hidden ? [21, 108] : clips.flatMap((clip) => clip.notes.map((note) => note[2]));
      const range = [Math.min(48, ...pitches), Math.max(72, ...pitches)];
      const span = Math.max(...clips.map((clip) => clip.seconds || 0), 0.1);
      const heard = clips.map((clip) => ({ started: clip.audio === null, seconds: 0 }));
      const began = () => {
        this.unlock(heard);
        if (!hidden && !choice) { state.open[key] = true; keep(); }
      };
      const views = clips.map((clip, side) => {
        const label = !state.blind ? names[side] : hidden ? "AB"[side] : `${"AB"[side]}: ${names[side]}`;
        const name = slug(`${section.title} prompt ${String(pair.prompt).padStart(2, "0")} ${names[side]}`);
        return clipView({
          clip, role: roles[side], label, hidden, span, range, where: this.where, heard: heard[side], began,
          source: () => URL.createObjectURL(new Blob([flac(clip)], { type: "audio/flac" })),
          downloads: downloads(clip, label, this.where, name),
        });
      });
      this.node.replaceChildren(
        make("h3", {}, `Prompt ${pair.prompt}: ${pair.words}`),
        ...[switcher(views, this.where)].filter(Boolean),
        make("div", { className: "clips" }, ...views),
        make("details", { className: "opening" }, make("summary", {}, "Tokens of the prompt"),
          make("p", {}, `${pair.opening}; seed ${pair.seed}`)));
      this.votes = [];
      if (hidden) this.node.append(this.ballot(names, heard));
      else {
        if (state.blind) {
          this.node.append(make("p", { className: "reveal", tabIndex: -1 }, this.verdict(choice)));
        }
        this.node.append(this.ratings());
      }
      this.unlock(heard);
    }

    unlock(heard) {
      const both = heard.every((side) => side.started);
      this.votes.forEach((vote) => vote.setAttribute("aria-disabled", String(!both)));
    }

    ballot(names, heard) {
      const hint = make("p", { className: "note" }, "Play both before you choose.");
      hint.id = `hint-${this.section.number}-${this.pair.prompt}`;
      const vote = (text, side) => {
        const node = button(text, `${text}, ${this.where}`, () => {
          if (node.getAttribute("aria-disabled") === "true") say("Play both pieces before you choose.");
          else this.choose(names, heard, side);
        });
        node.setAttribute("aria-describedby", hint.id);
        return node;
      };
      this.votes = [vote("I prefer A", 0), vote("I prefer B", 1), vote("No preference", null)];
      return make("fieldset", {}, make("legend", {}, "Which do you prefer?"),
        make("div", { className: "row" }, ...this.votes), hint);
    }

    choose(names, heard, side) {
      const { key } = this;
      state.choices[key] = {
        section: this.section.title, prompt: this.pair.prompt, seed: this.pair.seed, a: names[0], b: names[1],
        choice: side === null ? "none" : "AB"[side], preferred: side === null ? "" : names[side],
        heard_a_s: Number(heard[0].seconds.toFixed(1)), heard_b_s: Number(heard[1].seconds.toFixed(1)),
        heard_open: Boolean(state.open[key]), utc: new Date().toISOString(),
      };
      keep(); // before anything is revealed
      this.show();
      tally();
      say(`Prompt ${this.pair.prompt}: ${this.verdict(state.choices[key])}`);
      this.node.querySelector(".reveal").focus();
    }

    verdict(choice) {
      const [axis] = data.axes;
      const [a, b] = [choice.a, choice.b].map((name) => number(this.clip(name).ratings[axis]));
      return (choice.choice === "none" ? "You have no preference. " : `You prefer ${choice.choice}, ${choice.preferred}. `)
        + `A is ${choice.a}, B is ${choice.b}.` + ` ${axis}: A ${a}, B ${b}.`;
    }

    ratings() {
      const [first, other] = [this.section.first, this.other].map((name) => this.clip(name).ratings);
      return rows("Ratings", ["Axis", this.section.first, this.other, "Difference"], data.axes.map((axis) => {
        const [a, b] = [first[axis], other[axis]].map((value) => value ?? null);
        return [axis, number(a), number(b), a === null || b === null ? "none" : signed(b - a)];
      }));
    }
  }

  // --- Sections ------------------------------------------------------------------------------------------------------

  function means(section) {
    const box = section.node.querySelector(".means");
    const other = section.others[section.step].name;
    if (state.blind) { box.replaceChildren(make("p", { className: "note" }, "Mean ratings are hidden in blind listening.")); return; }
    const table = data.axes.map((axis) => {
      const both = section.pairs.map((pair) => [section.first, other]
        .map((name) => data.clips[pair.clips[name]].ratings[axis] ?? null)).filter((two) => !two.includes(null));
      const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
      const head = axis + (both.length < section.pairs.length ? ` (${both.length} pairs)` : "");
      if (!both.length) return [head, "none", "none", "none"];
      return [head, number(mean(both.map((two) => two[0]))), number(mean(both.map((two) => two[1]))),
        signed(mean(both.map((two) => two[1] - two[0])))];
    });
    box.replaceChildren(rows("Mean ratings of the pairs above", ["Axis", section.first, other, "Difference"], table));
  }

  const sections = data.sections.map((section, index) => {
    Object.assign(section, { number: index, step: section.others.length - 1, node: document.getElementById("section-" + index) });
    section.views = section.pairs.map((_, pair) => new Pair(section, pair));
    section.node.querySelector(".list").append(...section.views.map((view) => view.node));
    const slider = section.node.querySelector(".step");
    if (slider) {
      const label = () => {
        const { name, step } = section.others[section.step];
        const text = step === null ? name : `${step} (${name})`;
        slider.setAttribute("aria-valuetext", text);
        section.node.querySelector(".at").textContent = text;
      };
      slider.addEventListener("input", () => { section.step = Number(slider.value); label(); show(section); });
      label();
    }
    return section;
  });
  function show(section) {
    means(section);
    section.views.forEach((view) => view.show());
  }

  function tally() {
    const box = document.getElementById("tally");
    const [axis] = data.axes;
    const lines = sections.flatMap((section) => {
      const views = section.views.flatMap((view) => section.others.map(({ name }) => ({ view, name })));
      const made = views.flatMap(({ view, name }) => {
        const choice = state.choices[[section.number, view.pair.prompt, name].join("/")];
        return choice ? [{ choice, view }] : [];
      });
      if (!made.length) return [];
      const counts = [section.first, ...section.others.map(({ name }) => name)].map((name) =>
        [name, made.filter(({ choice }) => choice.preferred === name).length,
          made.some(({ choice }) => choice.a === name || choice.b === name)])
        .filter((entry) => entry[2]).map(([name, count]) => `${name} ${count}`);
      const none = made.filter(({ choice }) => choice.choice === "none").length;
      let agreed = 0, compared = 0;
      for (const { choice, view } of made) {
        const [a, b] = [choice.a, choice.b].map((name) => view.clip(name).ratings[axis] ?? null);
        if (choice.choice !== "none" && a !== null && b !== null && a !== b) {
          compared += 1;
          agreed += (a > b) === (choice.choice === "A");
        }
      }
      return [`${section.title}: ${made.length} ${made.length === 1 ? "choice" : "choices"}.`
        + ` You preferred ${counts.join(", ")}; no preference ${none}.`
        + (compared ? ` ${axis} agrees with you in ${agreed} of ${compared}.` : "")];
    });
    box.replaceChildren(...(lines.length ? lines : ["You have made no choices yet."]).map((text) => make("p", {}, text)));
  }

  // --- The listener's panel ------------------------------------------------------------------------------------------

  const blind = document.getElementById("blind");
  blind.checked = state.blind;
  blind.addEventListener("change", () => {
    state.blind = blind.checked;
    keep();
    sections.forEach(show);
    say(state.blind ? "Blind listening is on: names, notes and ratings are hidden until you choose." : "Blind listening is off.");
  });
  const chosen = () => Object.values(state.choices);
  document.getElementById("save-json").addEventListener("click", () =>
    save(JSON.stringify({ page: data.id, choices: chosen() }, null, 1), "application/json", `choices-${data.id}.json`));
  document.getElementById("save-csv").addEventListener("click", () => {
    const columns = ["section", "prompt", "seed", "a", "b", "choice", "preferred", "heard_a_s", "heard_b_s", "heard_open", "utc"];
    const cell = (value) => {  // an apostrophe keeps spreadsheets from reading a formula
      const text = typeof value === "string" && /^[=+\-@\t\r\n]/.test(value) ? `'${value}` : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [["page", ...columns], ...chosen().map((choice) => [data.id, ...columns.map((name) => choice[name])])];
    save(lines.map((line) => line.map(cell).join(",") + "\r\n").join(""), "text/csv", `choices-${data.id}.csv`);
  });
  document.getElementById("forget").addEventListener("click", () => {
    if (!confirm("Delete all your choices on this page?")) return;
    state = Object.assign(empty(), { blind: state.blind });
    keep();
    sections.forEach(show);
    tally();
    say("All choices are deleted.");
  });

  sections.forEach(show);
  tally();
  keep();
})();
