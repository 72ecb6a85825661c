// Where the page begins: a report, a run, or the list of runs.

import { fill, fromTemplate, h } from "./dom.js";
import { follow } from "./live.js";
import { RunView } from "./run.js";
import { RunsView } from "./runs.js";
import { setUpTheme } from "./theme.js";
import { fullMoment } from "./words.js";

const main = document.getElementById("content");
const signal = document.getElementById("signal");
const crumb = document.getElementById("crumb");
let view = null;

function say(word, text) {
  signal.className = `signal ${word}`;
  signal.textContent = text;
}

function showError(text) {
  view = null;
  fill(main, h("section", { class: "note" }, h("h1", {}, "It cannot be shown"), h("p", {}, text)));
}

function showReport(data) {
  view = new RunView(main);
  say("still", `as of ${fullMoment(data.made)}`);
  const home = document.getElementById("home");
  home.removeAttribute("href");
  crumb.textContent = data.name;
  view.update(data, data.made);
}

function showLocked() {
  say("still", "");
  const { content, slots } = fromTemplate("locked-view");
  fill(main, content);
  slots.form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await open(slots.token.value.replace(/^.*#/, ""))) start();
    else slots.error.textContent = "This is not the token.";
  });
  slots.token.focus();
}

// The token becomes a cookie, and leaves the address: it is in no history and no link.
async function open(token) {
  const answer = await fetch("login", { method: "POST", body: token });
  return answer.ok;
}

function start() {
  const id = new URLSearchParams(location.search).get("run");
  // Whatever this computer's clock says, ages are told by the server's.
  let behind = 0;
  const now = () => Date.now() / 1000 - behind;
  follow(
    id === null ? "" : `?run=${encodeURIComponent(id)}`,
    (data) => {
      if (data.error) return showError(data.error);
      view ??= id === null ? new RunsView(main) : new RunView(main);
      if (id !== null) crumb.textContent = data.name;
      view.update(data, now());
    },
    (word, time) => {
      if (time) behind = Date.now() / 1000 - time;
      if (word === "locked") showLocked();
      else if (word === "gone") showError("There is no such run in this folder.");
      else say(word, word === "live" ? "live" : "not connected, trying again");
    },
  );
  setInterval(() => view?.tick(now()), 1000);
}

setUpTheme(document.getElementById("theme"), () => view?.recolour());
const inlined = document.getElementById("data");
if (inlined) showReport(JSON.parse(inlined.textContent));
else {
  const token = location.hash.slice(1);
  if (token.length > 30) {
    history.replaceState(null, "", location.pathname + location.search);
    await open(token).catch(() => false);
  }
  say("still", "connecting");
  start();
}
