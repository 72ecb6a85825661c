// Following the server: the whole first, then patches of what has changed.

const RETRY_MS = [500, 1000, 2000, 5000, 10000];
// A page that nobody looks at asks nothing of the login node.
const HIDDEN_MS = 60000;
// The server speaks at least each 15 s: a silence of twice that is a dead line.
const SILENT_MS = 35000;

export function applyPatch(old, patch) {
  if ("set" in patch) return patch.set;
  if ("keep" in patch) {
    const [skip, count] = patch.keep;
    return [...old.slice(skip, skip + count), ...patch.add];
  }
  const next = { ...old };
  for (const key of patch.drop) delete next[key];
  for (const [key, inner] of Object.entries(patch.in)) next[key] = applyPatch(next[key], inner);
  return next;
}

// `show(data)` whenever it changes; `tell(word, time)`: live (and the server's time), lost, locked, or gone.
export function follow(query, show, tell) {
  let stop = new AbortController();
  let failures = 0;
  let timer = 0;

  async function connect() {
    stop = new AbortController();
    const mine = stop;
    try {
      const answer = await fetch(`events${query}`, { signal: mine.signal, headers: { Accept: "text/event-stream" } });
      if (answer.status === 401) return tell("locked");
      if (answer.status === 404) return tell("gone");
      if (!answer.ok) throw new Error(String(answer.status));
      tell("live", Date.parse(answer.headers.get("date")) / 1000);
      await readEvents(answer.body.getReader(), mine, show, () => (failures = 0));
    } catch {
      // What went wrong is known to nobody here; trying again is all that can be done.
    }
    if (mine !== stop || document.hidden && mine.signal.aborted) return;
    tell("lost");
    timer = setTimeout(connect, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
  }

  let hidden = 0;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(() => stop.abort(), HIDDEN_MS);
    else if (stop.signal.aborted) {
      clearTimeout(timer);
      connect();
    }
  });
  connect();
}

async function readEvents(reader, stop, show, heard) {
  const decoder = new TextDecoder();
  let text = "";
  let data = null;
  let silence = 0;
  const listen = () => {
    clearTimeout(silence);
    silence = setTimeout(() => stop.abort(), SILENT_MS);
  };
  try {
    for (;;) {
      listen();
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      text += decoder.decode(value, { stream: true });
      const events = text.split("\n\n");
      text = events.pop();
      let changed = false;
      for (const event of events) {
        const [kind, line] = event.split("\n");
        if (!line) continue;
        const body = JSON.parse(line.slice("data: ".length));
        data = kind === "event: whole" ? body : applyPatch(data, body);
        changed = true;
      }
      if (changed) show(data);
    }
  } finally {
    clearTimeout(silence);
  }
}
