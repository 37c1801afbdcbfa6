// Keys and drafts for the page where a task is ranked. Without this file the form works all the same.
"use strict";
(() => {
  const form = document.getElementById("rank");
  const { assignment, version, who } = JSON.parse(form.dataset.task);
  const cards = [...form.querySelectorAll(".card")];
  const notice = document.getElementById("notice");
  const field = (name) => form.elements.namedItem(name);
  const draftName = `plaudit:draft:${who}:${assignment}`;
  const pendingName = `plaudit:pending:${who}`;
  const letter = (card) => card.id.slice(5);
  const chosen = (card) => card.querySelector(".ranks input:checked");
  const complete = () => cards.every(chosen);
  let timer = 0, sending = false, wait = 2, shownAt = performance.now(), seconds = 0;
  document.documentElement.classList.add("js");

  // --- what is kept on this device; a browser may forbid it, and then the server's draft is all there is
  const recall = (name) => { try { return JSON.parse(localStorage.getItem(name)); } catch { return null; } };
  const keep = (name, value) => {
    try { value === null ? localStorage.removeItem(name) : localStorage.setItem(name, JSON.stringify(value)); } catch { /* no room */ }
  };
  const say = (text, link) => {
    notice.textContent = text;
    if (link) { const a = document.createElement("a"); a.href = "/"; a.textContent = link; notice.append(" ", a); }
    notice.hidden = !text;
  };

  // --- the form as data
  const ranks = () => Object.fromEntries(cards.filter(chosen).map((c) => [chosen(c).name.slice(5), Number(chosen(c).value)]));
  const state = () => ({ version, ranks: ranks(), note: field("note").value });
  const fill = (draft) => {
    for (const card of cards) for (const input of card.querySelectorAll(".ranks input"))
      input.checked = draft.ranks[input.name.slice(5)] === Number(input.value);
    field("note").value = draft.note;
    if (draft.note) field("note").closest("details").open = true;
  };
  const showOrder = () => {
    const places = new Map();
    for (const card of cards.filter(chosen)) {
      const place = Number(chosen(card).value);
      places.set(place, [...(places.get(place) || []), letter(card)]);
    }
    const order = [...places.keys()].sort((a, b) => a - b).map((place) => places.get(place).join(" = ")).join("  ›  ");
    const left = cards.length - cards.filter(chosen).length;
    document.getElementById("order").textContent = order && left ? `${order}  ·  ${left} to go` : order;
  };
  const headers = () => ({ "content-type": "application/json", accept: "application/json", "x-csrf-token": field("csrf").value });

  // --- drafts: on this device at once, on the server a moment later
  const saveDraft = async () => {
    const draft = state();
    try {
      const answer = await fetch(`/a/${assignment}/draft`, { method: "PUT", headers: headers(), body: JSON.stringify(draft), keepalive: true });
      if (answer.ok && JSON.stringify(state()) === JSON.stringify(draft)) keep(draftName, { ...draft, saved: true });
    } catch { /* it is on this device, and sent with the next change */ }
  };
  const changed = () => {
    showOrder();
    keep(draftName, state());
    clearTimeout(timer);
    timer = setTimeout(saveDraft, 700);
  };

  // --- sending: kept until the server says that it has it, and sent again under the same key
  const send = async (job) => {
    if (sending) return;
    sending = true;
    clearTimeout(timer);
    keep(pendingName, job);
    let later = wait;
    try {
      const answer = await fetch(job.url, { method: "POST", headers: headers(), body: JSON.stringify(job.body) });
      if (answer.ok) {
        keep(pendingName, null);
        keep(`plaudit:draft:${who}:${job.assignment}`, null);
        location.assign(job.next);
        return;
      }
      if (answer.status === 401) {
        say("Your session has ended. Your ranking is kept on this device and is sent when you have signed in again.", "Sign in");
        sending = false;
        return;
      }
      if (![408, 429, 503].includes(answer.status)) { // the server's own page says what is wrong
        keep(pendingName, null);
        if (job.assignment === assignment && !job.form) { form.action = job.url; form.submit(); }
        else if (job.form) document.getElementById(job.form).submit();
        else { say("An earlier ranking could not be recorded.", "Go on"); sending = false; }
        return;
      }
      later = Number(answer.headers.get("retry-after")) || wait;
      say(`The service is busy. Your ranking is kept and sent again in ${later} s.`);
    } catch {
      say("You are offline. Your ranking is kept on this device and sent as soon as the connection is back.");
    }
    sending = false;
    wait = Math.min(30, wait * 2);
    timer = setTimeout(() => send(job), later * 1000);
  };
  const submitTo = (url, next = "/") => {
    const common = { key: field("key").value, version };
    const body = url.endsWith("/skip") ? common
      : url.endsWith("/flag") ? { ...common, flags: [...form.querySelectorAll("[name=flags]:checked")].map((f) => f.value), note: field("note").value }
      : { ...common, ...state(), seconds: Math.round((seconds + (performance.now() - shownAt) / 1000) * 10) / 10 };
    if (url.endsWith("/ranking") && !complete()) {
      say("Give every answer a rank first. Equal ranks are ties.");
      focusOn(cards.find((card) => !chosen(card)));
    } else if (body.flags && !body.flags.length) {
      say("Choose what is wrong first.");
      form.querySelector("[name=flags]").focus();
    } else send({ url, body, next, assignment });
  };

  // --- keys
  const current = () => document.activeElement.closest?.(".card") || null;
  const focusOn = (card) => { if (card) { card.focus({ preventScroll: true }); card.scrollIntoView({ block: "nearest" }); } };
  const move = (by) => {
    const at = cards.indexOf(current());
    focusOn(cards[Math.max(0, Math.min(cards.length - 1, at < 0 ? 0 : at + by))]);
  };
  const rank = (place) => {
    const card = current() || cards.find((c) => !chosen(c)) || cards[0];
    const input = card.querySelector(`.ranks input[value="${place}"]`);
    if (!input) return;
    input.checked = true;
    changed();
    const at = cards.indexOf(card);
    focusOn([...cards.slice(at + 1), ...cards.slice(0, at)].find((c) => !chosen(c)) || card);
  };
  const help = document.getElementById("help");
  const keysOn = document.getElementById("keys-on");
  const openFlags = () => { const box = document.getElementById("flag"); box.open = true; box.querySelector("input").focus(); };
  const press = {
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    s: () => submitTo(`/a/${assignment}/skip`), f: openFlags, "?": () => help.showModal(),
    u: () => document.getElementById("undo")?.requestSubmit(), Enter: () => submitTo(`/a/${assignment}/ranking`),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || help.open) return;
    const target = event.target;
    if (target.matches("textarea, input[type=text], select")) return;
    if (event.key === "Enter" && target.matches("button, a, summary")) return;
    const enter = event.key === "Enter";
    if (!enter && !keysOn.checked) return;
    if (event.repeat && !event.key.startsWith("Arrow")) return;
    const action = /^[1-9]$/.test(event.key) ? () => rank(event.key) : press[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  keysOn.checked = recall("plaudit:keys") !== false;
  keysOn.addEventListener("change", () => keep("plaudit:keys", keysOn.checked));
  document.getElementById("help-button").addEventListener("click", () => help.showModal());

  // --- events
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submitTo(event.submitter?.getAttribute("formaction") || `/a/${assignment}/ranking`);
  });
  document.getElementById("undo")?.addEventListener("submit", (event) => {
    event.preventDefault();
    const undo = event.target;
    const id = undo.action.split("/").at(-2);
    const body = { key: undo.elements.key.value, version: Number(undo.elements.version.value) };
    send({ url: new URL(undo.action).pathname, body, next: `/a/${id}`, assignment: id, form: "undo" });
  });
  addEventListener("online", () => { const job = recall(pendingName); if (job) { clearTimeout(timer); send(job); } else saveDraft(); });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      seconds += (performance.now() - shownAt) / 1000;
      const draft = recall(draftName);
      if (draft && !draft.saved && !sending) saveDraft();
    }
    shownAt = performance.now();
  });

  // --- begin: what this device has and the server lacks
  const draft = recall(draftName);
  if (draft && !draft.saved && draft.version === version && !("newer" in form.dataset)) { fill(draft); changed(); }
  showOrder();
  const job = recall(pendingName);
  if (job) send(job);
  if (!matchMedia("(pointer: coarse)").matches) (cards.find((card) => !chosen(card)) || cards[0]).focus({ preventScroll: true });
})();
