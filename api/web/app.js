// Entry point of the page. The URL's fragment selects the view:
//
//   #chat          a new conversation
//   #chat/<id>     a saved conversation; /<number> after it is a message in it
//   #dashboard     the dashboard

import { Chat } from "./chat.js";
import { ConversationStore } from "./conversations.js";
import { Dashboard } from "./dashboard.js";
import { byId } from "./dom.js";
import { setUpHeader } from "./header.js";

setUpHeader();
const chat = new Chat(await ConversationStore.open());
const dashboard = new Dashboard(byId("dashboard-view"));

function show() {
  const [view, id, message] = location.hash.slice(1).split("/");
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
  if (!isDashboard) chat.open(id ?? null, message === undefined ? null : Number(message));
}

byId("skip-link").addEventListener("click", (event) => {
  event.preventDefault(); // the URL's fragment identifies the conversation, so it must not change
  byId("composer-input").focus();
});
addEventListener("hashchange", show);
show();
