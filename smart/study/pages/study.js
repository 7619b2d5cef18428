// Plays excerpts, keeps each answer on this device until the server acknowledges it, and fetches the next page.
"use strict";
(() => {
  const link = location.pathname;
  const status = document.getElementById("status");
  const say = (text) => { status.textContent = text; };
  const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
  const name = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

  // If storage is blocked, an answer is kept only while the page is open.
  const memory = {};
  const keep = (store, key, value) => {
    memory[key] = value;
    try { value === null ? store.removeItem(key) : store.setItem(key, value); } catch { /* blocked */ }
  };
  const kept = (store, key) => {
    try { return store.getItem(key) ?? memory[key] ?? null; } catch { return memory[key] ?? null; }
  };
  const session = kept(sessionStorageOrNone(), "session") ?? name();
  keep(sessionStorageOrNone(), "session", session);
  function sessionStorageOrNone() { try { return sessionStorage; } catch { return null; } }
  function localStorageOrNone() { try { return localStorage; } catch { return null; } }
  const queued = `answer ${link}`;

  // Repeat a request until `read` finds the study's own reply in the response: without a network, if the server is down
  // or busy, or if somebody else answers (the login page of a network, a proxy), wait and try again.
  async function ask(url, read, options = {}) {
    for (let tries = 0; ; tries += 1) {
      let pause = Math.min(0.5 * 2 ** tries, 10);
      try {
        const response = await fetch(url, { cache: "no-store", credentials: "omit", ...options });
        const wait = response.headers.get("retry-after");
        if (!(response.status >= 500 || response.status === 429 || (response.status === 409 && wait))) {
          const found = await read(response);
          if (found) {
            if (tries) say("");
            return found;
          }
          say("Something between this device and the study answers in its place (a login page?). "
            + "Your answers are kept on this device; trying again …");
        } else {
          if (wait) pause = Number(wait) || pause;
          if (response.status >= 500) say("The server is not responding. Your answers are kept; trying again …");
        }
      } catch {
        say("There is no connection. Your answers are kept on this device; trying again …");
      }
      await Promise.race([sleep(pause), new Promise((done) => addEventListener("online", done, { once: true }))]);
    }
  }

  // Show the next step, which the server knows, without leaving this page.
  async function advance() {
    const page = await ask(link, async (response) => {
      const found = new DOMParser().parseFromString(await response.text(), "text/html");
      return found.querySelector("main[data-study]") && found;
    });
    document.title = page.title;
    document.querySelector("main").replaceWith(document.adoptNode(page.querySelector("main")));
    scrollTo(0, 0);
    document.querySelector("h1").focus();
    start();
  }

  // Send the queued answer; it leaves the queue only once the server's reply names it.
  async function deliver() {
    const answer = kept(localStorageOrNone(), queued);
    if (answer === null) return;
    const headers = { "content-type": "application/json" };
    const { client_id } = JSON.parse(answer);
    const reply = await ask(`${link}/ratings`, async (response) => {
      const found = await response.json().catch(() => null);
      const whole = found && (response.ok ? Number.isInteger(found.rating) : typeof found.error === "string");
      return whole && found.client_id === client_id && found;
    }, { method: "POST", headers, body: answer });
    keep(localStorageOrNone(), queued, null);
    // a refusal is final: the page is fetched again, since the server knows the participant's step
    say(reply.error ? `This rating was not accepted: ${reply.error}.` : "");
  }

  let ahead = { url: "", sound: null };
  async function sound(url) {
    if (ahead.url === url && ahead.sound) return ahead.sound;
    const found = await ask(url, async (response) =>
      await heard(response) ?? ((await response.text()).includes("<main data-study") && "refused"));
    if (found === "refused") throw new Error(found);
    return found;
  }
  // The sound in a response; null if it has none.
  async function heard(response) {
    return response.ok && response.headers.get("content-type")?.startsWith("audio/") ? response.blob() : null;
  }
  async function fetchAhead(url) {
    if (ahead.url === url) return;
    try {
      const response = await fetch(url, { cache: "no-store", credentials: "omit" });
      ahead = { url, sound: await heard(response) };
    } catch { /* it is fetched again when it is needed */ }
  }

  // A button that plays and pauses; `starting` is called before the sound begins, with the time to start from.
  async function player(url, button, words, starting = () => {}) {
    const audio = new Audio();
    try {
      audio.src = URL.createObjectURL(await sound(url));
    } catch {
      say("The sound could not be loaded. Please reload this page.");
      return null;
    }
    button.addEventListener("click", () => {
      if (!audio.paused) { audio.pause(); return; }
      starting(audio.ended ? 0 : audio.currentTime);
      audio.play().catch(() => say("The sound could not be played."));
    });
    audio.addEventListener("play", () => { button.textContent = "Pause"; });
    audio.addEventListener("pause", () => { button.textContent = audio.ended ? words.again : words.resume; });
    button.textContent = words.first;
    button.disabled = false;
    return audio;
  }

  async function trial(main) {
    const { position, seconds, base, next } = main.dataset;
    const find = (id) => main.querySelector(`#${id}`);
    const [form, scale, send, playback] = ["trial", "scale", "send", "playback"].map(find);
    const words = { first: "Play", resume: "Resume", again: "Play again" };
    let [plays, listened, from, heardAt] = [0, 0, 0, null];
    const starting = (place) => { from = place; if (place === 0) plays += 1; };
    const audio = await player(`${base}/audio/${position}`, find("play"), words, starting);
    if (!audio) return;
    const stopped = () => { listened += audio.currentTime - from; from = audio.currentTime; };
    audio.addEventListener("pause", stopped);
    audio.addEventListener("seeking", () => { from = audio.currentTime; });  // skipped audio was not heard
    audio.addEventListener("timeupdate", () => { playback.value = audio.currentTime / (audio.duration || 1); });
    audio.addEventListener("ended", () => {
      if (heardAt === null && listened > 0.97 * Number(seconds)) {
        heardAt = performance.now();
        scale.disabled = false;
        say("Excerpt heard. You can rate it now.");
      }
    });
    form.addEventListener("change", () => { send.disabled = false; });
    form.addEventListener("keydown", (event) => {
      if (scale.disabled || event.ctrlKey || event.altKey || event.metaKey || !/^[0-9]$/.test(event.key)) return;
      const choice = form.querySelector(`[name=rating][value="${event.key === "0" ? 10 : event.key}"]`);
      choice.checked = true;
      choice.focus();
      send.disabled = false;
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const chosen = form.querySelector("[name=rating]:checked");
      if (!chosen || send.disabled) return;
      audio.pause();
      const answer = {
        position: Number(position), rating: Number(chosen.value), client_id: name(), session, play_count: plays,
        listened_s: listened, response_ms: Math.round(performance.now() - heardAt),
      };
      keep(localStorageOrNone(), queued, JSON.stringify(answer));
      send.disabled = scale.disabled = true;
      say("Saving …");
      await deliver();
      URL.revokeObjectURL(audio.src);
      await advance();
    });
    if (next) fetchAhead(`${base}/audio/${next}`);
  }

  function start() {
    const main = document.querySelector("main");
    if (main.dataset.page === "trial") trial(main);
    if (main.dataset.page === "check") {
      const words = { first: "Play the sound", resume: "Resume", again: "Play the sound again" };
      player(main.dataset.sound, main.querySelector("#play"), words);
    }
  }

  // An answer that is still queued was not acknowledged before the page was closed.
  if (document.querySelector("main").dataset.page === "trial" && kept(localStorageOrNone(), queued) !== null) {
    say("Saving …");
    deliver().then(advance);
  } else {
    start();
  }
})();
