// Where the page begins: which of its two views is shown follows from the address.
//
//   #chat          a new conversation
//   #chat/<id>     one that is kept
//   #dashboard     the dashboard

import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { byId } from "./dom.js";
import { setUpHeader } from "./header.js";

setUpHeader();
const chat = new Chat();
const dashboard = new Dashboard(byId("dashboard-view"));

function show() {
  const [view, id] = location.hash.slice(1).split("/");
  const isDashboard = view === "dashboard";
  document.body.dataset.view = isDashboard ? "dashboard" : "chat";
  document.title = isDashboard ? "Dashboard – Octavo" : "Octavo";
  byId("chat-view").hidden = isDashboard;
  byId("dashboard-view").hidden = !isDashboard;
  byId("skip-link").hidden = isDashboard;
  for (const link of document.querySelectorAll("[data-view-link]")) {
    if (link.dataset.viewLink === document.body.dataset.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  dashboard.isShown = isDashboard;
  if (!isDashboard) chat.open(id ?? null);
}

byId("skip-link").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which conversation it is
  byId("composer-input").focus();
});
addEventListener("hashchange", show);
show();
