"use strict";
// A token's numbers stand at the foot of the page while it is pointed at or tapped: a touch screen shows no title.
const readout = document.getElementById("readout");
let on = null;
function show(event) {
  const token = event.target.closest(".t[title]");
  if (!token || token === on) return;
  if (on) on.classList.remove("on");
  on = token;
  on.classList.add("on");
  readout.textContent = "“" + token.textContent + "” " + token.title;
  readout.hidden = false;
}
document.addEventListener("pointerover", show);
document.addEventListener("click", show);
