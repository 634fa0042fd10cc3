// Shows each run's newest sample grid at or before the step of the slider.
const slider = document.querySelector("#step");
function show() {
  const step = +slider.dataset.steps.split(" ")[slider.value];
  document.querySelector("#shown").textContent = step.toLocaleString("en");
  for (const figure of document.querySelectorAll("figure.grids")) {
    const frames = [...figure.querySelectorAll("img")];
    const before = frames.filter((frame) => +frame.dataset.step <= step);
    const chosen = before.length ? before[before.length - 1] : frames[0];
    for (const frame of frames) frame.hidden = frame !== chosen;
    figure.querySelector(".at").textContent = `step ${(+chosen.dataset.step).toLocaleString("en")}`;
  }
}
slider.addEventListener("input", show);
