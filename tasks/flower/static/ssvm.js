// Adds Retry and Cancel to Flower's task page and list, and fills the page of jobs. Text is inserted as text, not as HTML.
(() => {
  const prefix = document.getElementById("url_prefix").value.replace(/^\/*|\/*$/g, "");
  const root = prefix ? `/${prefix}` : "";
  const verbs = { failed: "retry", cancelled: "retry", running: "cancel", queued: "cancel" };
  const xsrf = () => (document.cookie.match(/(?:^|; )_xsrf=([^;]*)/) || [])[1] || "";

  // Hide Flower's own commands. The server refuses them or handles them differently. Cancel and Retry replace them.
  const hidden = document.createElement("style");
  hidden.textContent = `#task-terminate, #task-revoke, #worker-pool-restart, #pool-controls-heading, .worker-controls-form,
    #worker-add-consumer, #add-consumer-name, [id^="worker-cancel-consumer"], [id^="task-rate-limit"],
    [id^="task-timeout"] { display: none !important; }`;
  document.head.append(hidden);

  const make = (tag, text, name) => {
    const it = document.createElement(tag);
    if (text !== undefined) it.textContent = text;
    if (name) it.className = name;
    return it;
  };

  async function get(path) {
    const answer = await fetch(root + path, { headers: { Accept: "application/json" } });
    return answer.json();
  }

  // Return a button that retries or cancels one job once, or null if the state allows neither.
  function button(id, state, after) {
    const verb = verbs[state];
    if (!verb) return null;
    const look = verb === "retry" ? "btn-primary" : "btn-outline-danger";
    const it = make("button", verb === "retry" ? "Retry" : "Cancel", `btn btn-sm ${look} ssvm-${verb}`);
    it.type = "button";
    it.addEventListener("click", async (event) => {
      event.stopPropagation();
      it.disabled = true;
      const answer = await fetch(`${root}/ssvm/${verb}/${encodeURIComponent(id)}`, {
        method: "POST", headers: { "X-Xsrftoken": xsrf() },
      });
      const values = await answer.json().catch(() => ({ message: answer.statusText }));
      it.textContent = answer.ok ? (verb === "retry" ? "Queued again" : "Asked to stop") : "Refused";
      it.title = values.message || "";
      if (after) after(answer.ok, values);
    });
    return it;
  }

  async function onTaskPage(place) {
    const id = document.getElementById("taskid").textContent;
    const found = await get(`/ssvm/states?ids=${encodeURIComponent(id)}`);
    const job = found.jobs[id];
    if (!job) return;
    place.append(make("span", `Job ${job.job_id}: ${job.state}`, "me-2 ssvm-state"));
    const it = found.may_act && button(id, job.state);
    if (it) place.append(it);
  }

  async function onList(table) {
    const links = [...table.querySelectorAll("tbody a[href*='/task/']")].filter((link) => !link.dataset.ssvm);
    if (!links.length) return;
    const ids = new Map(links.map((link) => [link, decodeURIComponent(link.pathname.split("/task/")[1])]));
    for (const link of links) link.dataset.ssvm = "asked";
    const found = await get(`/ssvm/states?ids=${encodeURIComponent([...ids.values()].join(","))}`);
    for (const [link, id] of ids) {
      const job = found.jobs[id];
      const it = job && found.may_act && button(id, job.state);
      if (it) link.after(" ", it);
    }
  }

  function fill(table, rows) {
    table.tBodies[0].replaceChildren(...rows.map((cells) => {
      const row = make("tr");
      row.append(...cells.map((cell) => {
        const it = make("td");
        it.append(cell === null || cell === undefined ? "" : cell);
        return it;
      }));
      return row;
    }));
  }

  const size = (bytes) => {
    let unit = 0;
    for (; bytes >= 1024 && unit < 4; unit++) bytes /= 1024;
    return `${bytes.toFixed(unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
  };

  function progress(job) {
    if (job.error) return make("span", job.error, "text-danger");
    const now = job.progress;
    if (!now || job.state !== "running") return now && now.bytes ? size(now.bytes) : "";
    const it = make("span");
    if (now.total) {
      const bar = make("progress");
      bar.max = now.total;
      bar.value = now.bytes;
      it.append(bar, " ");
    }
    it.append(`${now.stage || ""} ${size(now.bytes || 0)}, ${size(now.rate || 0)}/s`);
    return it;
  }

  function waits(seconds) {
    return seconds ? `${Math.round(seconds)} s` : "";
  }

  async function onJobs() {
    const state = document.getElementById("ssvm-state").value;
    const found = await get(`/ssvm/jobs?state=${state}`);
    document.getElementById("ssvm-message").textContent = found.message || "";
    if (found.message) return;
    fill(document.getElementById("ssvm-lanes"), found.lanes.map((lane) => [lane.zone, lane.lane,
      ...["queued", "running", "failed"].map((each) => String(lane.counts[each] || 0)), waits(lane.oldest_s)]));
    fill(document.getElementById("ssvm-workers"), found.workers.map((worker) => [worker.worker, worker.state, worker.zone,
      worker.lanes.join(", "), `${worker.active}/${worker.capacity}`]));
    fill(document.getElementById("ssvm-stores"), found.stores.map((store) => [store.name,
      make("span", store.error || store.state, store.state === "up" ? "" : "text-danger"),
      ...["used", "free"].map((each) => (store[each] === undefined ? "" : size(store[each]))),
      store.latency_ms === undefined ? "" : `${Math.round(store.latency_ms)} ms`]));
    fill(document.getElementById("ssvm-table"), found.jobs.map((job) => {
      const link = make("a", job.job_id);
      link.href = `${root}/task/${encodeURIComponent(job.job_id)}`;
      const shown = job.retried_by.length ? `${job.state}, retried by ${job.retried_by[0]}` : job.state;
      return [link, job.job, job.zone, shown, progress(job), job.created.replace("T", " ").slice(0, 19),
        found.may_act ? button(job.job_id, job.state, refresh) : null];
    }));
  }

  let asked = 0;
  function refresh() {
    clearTimeout(asked);
    onJobs().catch(() => {}).finally(() => { asked = setTimeout(refresh, 2000); });
  }

  const workers = document.querySelector(".app-nav");
  if (workers) {
    const item = make("li", undefined, "nav-item");
    const link = make("a", "Jobs", "nav-link");
    link.href = `${root}/jobs`;
    if (document.getElementById("ssvm-jobs")) link.classList.add("active");
    item.append(link);
    workers.prepend(item);
  }
  const place = document.querySelector("#task-page .detail-actions");
  if (place) onTaskPage(place);
  const table = document.getElementById("tasks-table");
  if (table) new MutationObserver(() => onList(table)).observe(table, { childList: true, subtree: true });
  if (document.getElementById("ssvm-jobs")) {
    document.getElementById("ssvm-state").addEventListener("change", refresh);
    refresh();
  }
})();
