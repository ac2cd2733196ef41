// Adds Retry and Cancel to Flower's pages, and keeps the pages of jobs up to date.
// The server renders and escapes the pages. This script fetches the same page again and exchanges what has changed.
(() => {
  const prefix = document.getElementById("url_prefix").value.replace(/^\/*|\/*$/g, "");
  const root = prefix ? `/${prefix}` : "";
  const verbs = { failed: "retry", cancelled: "retry", running: "cancel", queued: "cancel" };
  // A Flower that hangs must not leave a page with old figures and no message.
  const ASK_MS = 20000, ACT_MS = 120000;
  const SILENT = "Flower does not answer";
  const xsrf = () => (document.cookie.match(/(?:^|; )_xsrf=([^;]*)/) || [])[1] || "";

  const make = (tag, text, name) => {
    const it = document.createElement(tag);
    if (text !== undefined) it.textContent = text;
    if (name) it.className = name;
    return it;
  };

  // Show a message. A refusal stays until the user closes it.
  function say(text, ok) {
    const it = make("div", undefined, `toast ssvm-toast align-items-center text-bg-${ok ? "success" : "danger"} border-0`);
    it.setAttribute("role", ok ? "status" : "alert");
    const line = make("div", undefined, "d-flex");
    const close = make("button", undefined, "btn-close btn-close-white me-2 m-auto");
    close.type = "button";
    close.dataset.bsDismiss = "toast";
    close.ariaLabel = "Close";
    line.append(make("div", text, "toast-body"), close);
    it.append(line);
    document.getElementById("toast-container").append(it);
    it.addEventListener("hidden.bs.toast", () => it.remove());
    new bootstrap.Toast(it, { autohide: ok, delay: 6000 }).show();
  }

  // Send a POST request. Return [whether it succeeded, its JSON with a message for each failure].
  async function post(path, body) {
    try {
      const answer = await fetch(root + path, {
        method: "POST", headers: { "X-Xsrftoken": xsrf() }, body: body && JSON.stringify(body),
        signal: AbortSignal.timeout(ACT_MS),
      });
      const values = await answer.json().catch(() => null);
      if (values) return [answer.ok, values];
      return [false, { message: answer.status === 401 ? "You are not logged in any more. Load the page again"
        : `Flower refused this: ${answer.status} ${answer.statusText}` }];
    } catch {
      return [false, { message: `${SILENT}. Look at the job before you try again` }];
    }
  }

  const really = (what) => confirm(`Cancel ${what}? The transfer stops, and what it has stored is removed.`);

  async function act(it) {
    const verb = it.dataset.ssvmVerb, id = it.dataset.ssvmJob;
    if (verb === "cancel" && !really(`job ${id}`)) return;
    it.disabled = true;
    const [ok, values] = await post(`/ssvm/${verb}/${encodeURIComponent(id)}`);
    const done = verb === "retry" ? "is queued again" : values.state === "cancelled" ? "is cancelled" : "was asked to stop";
    say(ok ? `Job ${values.job_id} ${done}` : values.message, ok);
    if (!ok) it.disabled = false;
    else if (!document.querySelector("[data-ssvm-live]")) it.remove();
    refresh();
  }

  // Flower's own pages

  function button(job, id) {
    const verb = verbs[job.state];
    if (!verb) return null;
    const look = verb === "retry" ? "btn-primary" : "btn-outline-danger";
    const it = make("button", verb === "retry" ? "Retry" : "Cancel", `btn btn-sm ${look} ssvm-${verb}`);
    it.type = "button";
    it.dataset.ssvmVerb = verb;
    it.dataset.ssvmJob = id;
    return it;
  }

  async function states(ids) {
    const answer = await fetch(`${root}/ssvm/states?ids=${encodeURIComponent(ids.join(","))}`);
    return answer.ok ? answer.json() : { jobs: {} };
  }

  async function onTaskPage(place) {
    const id = document.getElementById("taskid").textContent;
    const found = await states([id]);
    const job = found.jobs[id];
    if (!job) return;
    const link = make("a", `Job ${job.job_id}: ${job.state}`, "me-2 ssvm-state");
    link.href = `${root}/jobs/${encodeURIComponent(job.job_id)}`;
    place.append(link);
    const it = found.may_act && button(job, id);
    if (it) place.append(it);
  }

  async function onList(table) {
    const links = [...table.querySelectorAll("tbody a[href*='/task/']")].filter((link) => !link.dataset.ssvm);
    if (!links.length) return;
    const ids = new Map(links.map((link) => [link, decodeURIComponent(link.pathname.split("/task/")[1])]));
    for (const link of links) link.dataset.ssvm = "asked";
    const found = await states([...ids.values()]);
    for (const [link, id] of ids) {
      const job = found.jobs[id];
      const it = job && found.may_act && button(job, id);
      if (it) link.after(" ", it);
    }
  }

  // The pages of jobs. `known` has the HTML that the server sent last, by element. What has not changed stays as it
  // is, so that no click, selection or open text is lost.
  const known = new Map();
  const live = document.querySelector("[data-ssvm-live]");
  let timer = 0, pressed = false, last = "";

  function exchange(key, old, fresh) {
    if (known.get(key) === fresh.innerHTML) return;
    known.set(key, fresh.innerHTML);
    const open = [...old.querySelectorAll("details")].map((each) => each.open);
    old.replaceChildren(...document.importNode(fresh, true).childNodes);
    old.querySelectorAll("details").forEach((each, at) => { each.open = Boolean(open[at]); });
  }

  function exchangeRows(old, fresh) {
    const rows = [...fresh.rows].map((row) => {
      const mine = document.getElementById(row.id);
      if (!mine || mine.cells.length !== row.cells.length) return document.importNode(row, true);
      [...row.cells].forEach((cell, at) => exchange(`${row.id} ${at}`, mine.cells[at], cell));
      return mine;
    });
    if (rows.some((row, at) => old.rows[at] !== row) || rows.length !== old.rows.length) old.replaceChildren(...rows);
  }

  function remember(place) {
    for (const part of place.querySelectorAll("[data-ssvm-part]")) known.set(part.id, part.innerHTML);
    for (const row of place.querySelectorAll("[data-ssvm-rows] > tr")) {
      [...row.cells].forEach((cell, at) => known.set(`${row.id} ${at}`, cell.innerHTML));
    }
  }

  function status(text, ok) {
    document.getElementById("ssvm-updated").textContent = text;
    document.getElementById("ssvm-dot").className = `status-dot status-dot-${ok ? "live" : "error"}`;
  }

  async function ask(url) {
    const answer = await fetch(url, { headers: { Accept: "text/html" }, signal: AbortSignal.timeout(ASK_MS) });
    return [answer, await answer.text()];
  }

  async function update() {
    const [answer, text] = await ask(location.pathname + location.search).catch(() => { throw new Error(SILENT); });
    const page = new DOMParser().parseFromString(text, "text/html");
    if (!answer.ok) {
      const message = page.getElementById("ssvm-message");
      throw new Error(message ? message.textContent : `Flower refused the page: ${answer.status}`);
    }
    if (pressed) return;
    for (const fresh of page.querySelectorAll("[data-ssvm-part]")) {
      const old = document.getElementById(fresh.id);
      if (old) exchange(fresh.id, old, fresh);
    }
    const rows = page.querySelector("[data-ssvm-rows]");
    if (rows) exchangeRows(document.getElementById(rows.id), rows);
    known.clear();
    remember(page);
    last = page.getElementById("ssvm-updated").textContent;
    status(last, true);
    count();
  }

  // Update the page every two seconds, more rarely if the server needs long, and not while the page is hidden.
  function refresh() {
    clearTimeout(timer);
    if (!live) return;
    const start = Date.now();
    (document.hidden ? Promise.resolve() : update())
      .catch((error) => status(`${last}. Not up to date: ${error.message}`, false))
      .finally(() => { clearTimeout(timer); timer = setTimeout(refresh, Math.max(2000, 10 * (Date.now() - start))); });
  }

  const picks = () => [...document.querySelectorAll("[data-ssvm-pick]")];
  const matching = () => document.getElementById("ssvm-matching")?.checked;

  function count() {
    const bulk = document.getElementById("ssvm-bulk");
    if (!bulk) return;
    const number = picks().filter((each) => each.checked).length;
    bulk.querySelectorAll("[data-ssvm-bulk]").forEach((each) => { each.disabled = !number && !matching(); });
    document.getElementById("ssvm-selected").textContent =
      matching() ? "all jobs that match are selected" : number ? `${number} selected` : "";
  }

  async function actOnMany(it) {
    const verb = it.dataset.ssvmBulk;
    const ids = picks().filter((each) => each.checked).map((each) => each.dataset.ssvmPick);
    const what = matching() ? "all queued and running jobs that match the filters" : `${ids.length} selected jobs`;
    if (verb === "cancel" ? !really(what) : matching() && !confirm(`Retry all failed jobs that match the filters?`)) return;
    it.disabled = true;
    const [ok, values] = await post(`/ssvm/${verb}`, matching() ? { query: location.search } : { ids });
    if (!ok) say(values.message, false);
    else {
      say(`${values.done} ${verb === "retry" ? "jobs are queued again" : "jobs are cancelled or were asked to stop"}${values.has_more ? ". There are more: repeat this" : ""}`, true);
      if (values.refused.length) say(`${values.refused.length} refused. The first: ${values.refused[0].message}`, false);
    }
    for (const each of document.querySelectorAll("#ssvm-all, #ssvm-matching, [data-ssvm-pick]")) each.checked = false;
    count();
    refresh();
  }

  document.addEventListener("click", (event) => {
    const one = event.target.closest("[data-ssvm-verb]"), many = event.target.closest("[data-ssvm-bulk]");
    if (one || many) event.stopPropagation();
    if (one) act(one);
    if (many) actOnMany(many);
  }, true);
  document.addEventListener("change", (event) => {
    if (event.target.id === "ssvm-all") picks().forEach((each) => { each.checked = event.target.checked; });
    if (event.target.closest("#ssvm-filters select")) event.target.form.requestSubmit();
    count();
  });
  document.getElementById("ssvm-filters")?.addEventListener("submit", (event) => {
    for (const each of event.target.elements) each.disabled = each.name && !each.value; // keep the URL short
  });
  window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  document.addEventListener("pointerdown", () => { pressed = true; });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { pressed = false; });

  const place = document.querySelector("#task-page .detail-actions");
  if (place) onTaskPage(place);
  const table = document.getElementById("tasks-table");
  if (table) new MutationObserver(() => onList(table)).observe(table, { childList: true, subtree: true });
  if (live) {
    remember(document);
    last = document.getElementById("ssvm-updated").textContent;
    timer = setTimeout(refresh, 2000);
  }
})();
