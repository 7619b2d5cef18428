"use strict";
// What pages that play pieces share. A clip has `notes` (onset, length, pitch, velocity), `seconds`, `silent`, and
// `audio`, which is null for a piece without sound. Nothing here asks for anything: the page says where audio comes from.
const Listen = (() => {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let quiet;
  const say = (text) => { // for screen readers; visible to everyone for a few seconds
    const live = document.getElementById("live");
    live.textContent = text;
    clearTimeout(quiet);
    quiet = setTimeout(() => { live.textContent = ""; }, 8000);
  };

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.includes("-") || name === "role") node.setAttribute(name, value); else node[name] = value;
    }
    node.append(...children);
    return node;
  }
  function draw(tag, attributes, parent) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    parent.append(node);
    return node;
  }
  const button = (text, label, act) => {
    const node = make("button", { type: "button" }, text);
    if (label) node.setAttribute("aria-label", label);
    node.addEventListener("click", act);
    return node;
  };
  const pitchName = (pitch) => { // spelt out, because screen readers may skip signs
    const name = ["C", "C sharp ", "D", "E flat ", "E", "F", "F sharp ", "G", "A flat ", "A", "B flat ", "B"][pitch % 12];
    return name + (Math.floor(pitch / 12) - 1);
  };
  const number = (value) => value === null || value === undefined ? "none" : value.toFixed(2);
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
  const slug = (text) => text.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "").toLowerCase();

  function save(content, type, name) {
    const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  let playing = null; // the clip that is playing

  // One clip: heading, roll, player, downloads. `label` is its name on the page; `hidden` hides all but the sound;
  // `source` gives (a promise of) the address of the audio; `downloads` stands below. `heard` counts what was heard.
  function clipView({ clip, role, label, hidden, span, range, where, source, downloads, heard = {}, began = () => {} }) {
    const node = make("div", { className: "clip", role: "group", "aria-label": `${label}, ${where}` },
      make("h4", {}, label));
    node.dataset.role = hidden ? "hidden" : role;
    if (clip.audio === null) {
      node.append(make("p", { className: "missing" }, "This piece could not be rendered: it has no audio and no rating."));
      if (!hidden) node.append(downloads);
      return node;
    }
    const audio = make("audio", { preload: "none" });
    const roll = rollView(clip, label, where, hidden, span, range);
    const playhead = roll.querySelector(".playhead");
    const time = make("span", { className: "time" });
    const seek = make("input", { type: "range", min: 0, max: span, step: 0.05, value: 0 });
    seek.setAttribute("aria-label", `Position in ${label}, ${where}`);
    const play = button("Play", `Play ${label}, ${where}`, () => (audio.paused ? start() : audio.pause()));
    play.className = "play";

    let gone = false; // once the clip is no longer shown
    let wanted = 0; // where to start, until the audio is loaded
    const position = () => (audio.src ? audio.currentTime : wanted);
    function show() {
      const now = position();
      playhead.setAttribute("x1", now);
      playhead.setAttribute("x2", now);
      seek.value = now;
      const text = `${now.toFixed(1)} of ${clip.seconds.toFixed(1)} s`;
      seek.setAttribute("aria-valuetext", text);
      if (time.textContent !== text) time.textContent = text;
    }
    function move(to) {
      wanted = Math.min(Math.max(to, 0), clip.seconds);
      if (audio.src) audio.currentTime = wanted;
      show();
    }
    async function load() {
      if (audio.src) return;
      const found = await source();
      if (audio.src || gone) { URL.revokeObjectURL(found); return; } // asked for twice, or no longer shown
      audio.src = found;
      if (wanted) audio.addEventListener("loadedmetadata", () => { audio.currentTime = wanted; }, { once: true });
    }
    async function start() {
      try {
        await load();
        if (gone) return;
        if (playing && playing !== audio) playing.pause();
        playing = audio;
        await audio.play();
      } catch (error) {
        if (error.name !== "AbortError") say(`${label} cannot be played: ${error.message}`);
      }
    }
    function follow() {
      show();
      if (!audio.paused && !calm.matches) requestAnimationFrame(follow);
    }
    let last = 0;
    audio.addEventListener("play", () => {
      play.textContent = "Pause";
      play.setAttribute("aria-label", `Pause ${label}, ${where}`);
      node.classList.add("on");
      last = audio.currentTime;
      heard.started = true;
      began();
      follow();
    });
    audio.addEventListener("pause", () => {
      play.textContent = "Play";
      play.setAttribute("aria-label", `Play ${label}, ${where}`);
      node.classList.remove("on");
      show();
    });
    audio.addEventListener("timeupdate", () => {
      const passed = audio.currentTime - last;
      last = audio.currentTime;
      if (passed > 0 && passed < 1) heard.seconds = (heard.seconds || 0) + passed;
      show();
    });
    audio.addEventListener("seeked", () => { last = audio.currentTime; show(); });
    seek.addEventListener("input", () => move(Number(seek.value)));
    roll.addEventListener("click", (event) => {
      const box = roll.getBoundingClientRect();
      move((event.clientX - box.left) / box.width * span);
    });
    node.append(frame(roll, seek, span, range), make("div", { className: "row" }, play, time), audio);
    if (!hidden) {
      node.append(make("p", { className: "about" }, describe(clip)), downloads);
    }
    show();
    node.player = { audio, label, seconds: clip.seconds, position, move, load, start };
    node.stop = () => {
      gone = true;
      audio.pause();
      if (audio.src) URL.revokeObjectURL(audio.src);
    };
    return node;
  }

  // One player for two clips, which goes from one to the other at the same instant; null unless both have sound.
  function switcher(views, where) {
    const players = views.map((view) => view.player);
    if (players.length !== 2 || players.includes(undefined)) return null;
    let side = 0; // the clip that plays, or played last
    const play = button("Play", "", () => {
      if (players[side].audio.paused) {
        Promise.resolve(players[1 - side].load()).catch(() => {}); // so that it is ready
        players[side].start();
      } else players[side].audio.pause();
    });
    const change = button("", "", () => {
      const [from, to] = [players[side], players[1 - side]];
      const [now, sounds] = [from.position(), !from.audio.paused];
      side = 1 - side;
      to.move(now);
      if (sounds && now >= to.seconds - 0.05) { from.audio.pause(); say(`${to.label} has ended by then.`); }
      else if (sounds) to.start();
      show();
    });
    function show() {
      const sounds = !players[side].audio.paused;
      play.textContent = `${sounds ? "Pause" : "Play"} ${players[side].label}`;
      play.setAttribute("aria-label", `${play.textContent} in the player of both, ${where}`);
      change.textContent = `Switch to ${players[1 - side].label}`;
      change.setAttribute("aria-label", `${change.textContent} at the same instant, ${where}`);
    }
    players.forEach(({ audio }, place) => ["play", "pause"].forEach((event) => audio.addEventListener(event, () => {
      if (event === "play") side = place;
      show();
    })));
    show();
    const node = make("div", { className: "row switcher", role: "group" }, play, change);
    node.setAttribute("aria-label", `Both, ${where}`);
    return node;
  }

  const heardNotes = (clip) => clip.notes.filter(([onset]) => onset < clip.seconds);

  function describe(clip) {
    const notes = heardNotes(clip);
    const pitches = notes.map((note) => note[2]);
    const later = clip.notes.length - notes.length;
    const [low, high] = [Math.min(...pitches), Math.max(...pitches)].map(pitchName);
    return (!notes.length ? "No notes" : notes.length === 1 ? `1 note, ${low},`
        : `${notes.length} notes from ${low} to ${high}`)
      + ` in ${clip.seconds.toFixed(1)} seconds` + (later ? `, ${later} more after that in the MIDI file` : "")
      + (clip.silent ? ". The clip is silent." : ".");
  }

  function rollView(clip, label, where, hidden, span, [low, high]) {
    const roll = draw("svg", {
      class: "roll", role: "img", viewBox: `0 0 ${span} ${high - low + 1}`, preserveAspectRatio: "none",
      "aria-label": `Piano roll of ${label}, ${where}: ` + (hidden ? "hidden until you have chosen." : describe(clip)),
    }, document.createDocumentFragment());
    for (let second = 1; second < span; second += 1) {
      draw("line", { x1: second, x2: second, y1: 0, y2: high - low + 1 }, roll);
    }
    for (let pitch = Math.ceil(low / 12) * 12; pitch <= high; pitch += 12) { // a line under every C
      draw("line", { x1: 0, x2: span, y1: high - pitch + 1, y2: high - pitch + 1 }, roll);
    }
    if (clip.seconds < span) {
      draw("rect", { class: "after", x: clip.seconds, y: 0, width: span - clip.seconds, height: high - low + 1 }, roll);
    }
    for (const [onset, length, pitch, velocity] of hidden ? [] : heardNotes(clip)) {
      draw("rect", {
        class: "note", x: onset, y: high - pitch, width: Math.min(length, clip.seconds - onset), height: 1,
        "fill-opacity": 0.35 + 0.65 * velocity / 127, "data-pitch": pitch, "data-velocity": velocity,
      }, roll);
    }
    draw("line", { class: "playhead", x1: 0, x2: 0, y1: 0, y2: high - low + 1 }, roll);
    return roll;
  }

  // A roll with the names of the Cs on its left, seconds below it, and the slider below them.
  function frame(roll, seek, span, [low, high]) {
    const pitches = make("div", { className: "pitches", "aria-hidden": "true" });
    for (let pitch = Math.ceil(low / 12) * 12; pitch <= high; pitch += 12) {
      const name = make("span", {}, pitchName(pitch));
      name.style.top = `${100 * (high - pitch + 0.5) / (high - low + 1)}%`;
      pitches.append(name);
    }
    const seconds = make("div", { className: "seconds", "aria-hidden": "true" });
    const step = [1, 2, 5, 10, 20, 60, 120].find((each) => span / each <= 6) || 600;
    for (let second = 0; second <= span; second += step) {
      const name = make("span", {}, second ? String(second) : "0 s");
      name.style.left = `${100 * second / span}%`;
      if (second > 0.95 * span) name.className = "last";
      seconds.append(name);
    }
    return make("div", { className: "frame" }, pitches, roll, seconds, seek);
  }

  function rows(caption, heads, axisRows) {
    return make("table", { className: "ratings" }, make("caption", {}, caption),
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...axisRows.map(([head, ...cells]) => make("tr", {}, make("th", { scope: "row" }, head),
        ...cells.map((cell) => make("td", {}, cell))))));
  }

  const isPlaying = () => playing !== null && !playing.paused;

  return { make, draw, button, say, number, signed, slug, save, clipView, switcher, rows, isPlaying };
})();
