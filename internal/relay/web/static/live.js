// Keeps a page up to date while it is looked at. Everything works without it.
"use strict";

const main = document.querySelector("main");
let source, asking, again, leaving;

// refresh gets the page again, one request at a time.
async function refresh() {
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  try {
    const answer = await fetch(location.href);
    if (answer.redirected || !answer.ok) {
      if (!leaving) location.reload(); // logged out, or not there any more
    } else {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      become(main, page.querySelector("main"));
    }
  } catch {
    // The relay is away; the stream begins anew when it is back.
  }
  asking = false;
  if (again) {
    again = false;
    refresh();
  }
}

// touched says whether somebody is filling a form in.
const touched = form => form.contains(document.activeElement) || [...form.elements].some(e =>
  e.options ? e.selectedIndex != Math.max(0, [...e.options].findIndex(o => o.defaultSelected)) :
  e.type != "hidden" && e.defaultValue != undefined && (e.value != e.defaultValue || e.checked != e.defaultChecked));

// become makes an element what it is on the new page, and leaves alone what is the same: focus, scrolling, what is unfolded, and forms that are being
// filled in.
function become(old, now) {
  if (old.isEqualNode(now) || old.nodeName == "FORM" && touched(old)) return;
  if (old.nodeType != Node.ELEMENT_NODE) {
    old.data = now.data;
    return;
  }
  for (const {name} of [...old.attributes]) if (!now.hasAttribute(name) && name != "open") old.removeAttribute(name);
  for (const {name, value} of now.attributes) if (old.getAttribute(name) != value) old.setAttribute(name, value);
  let at = old.firstChild;
  for (const child of [...now.childNodes]) {
    const found = child.id ? [...old.children].find(e => e.id == child.id) : at && !at.id && at.nodeName == child.nodeName ? at : null;
    if (!found) old.insertBefore(document.importNode(child, true), at);
    else if (found == at) at = at.nextSibling;
    else old.insertBefore(found, at);
    if (found) become(found, child);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function listen() {
  source?.close();
  if (document.hidden) return;
  source = new EventSource("/events?page=" + encodeURIComponent(location.pathname));
  source.onmessage = refresh;
}

// Who has pressed "Log out" is on the way to another page: a reload would take its place, and its answer would be lost. If no other page comes this one looks
// again whether it is still there.
addEventListener("submit", () => {
  clearTimeout(leaving);
  leaving = setTimeout(() => {
    leaving = undefined;
    listen();
    refresh();
  }, 10_000);
});

document.addEventListener("visibilitychange", listen);
listen();
