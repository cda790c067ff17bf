/* Verdicts that some program has; `stale` is a state of ours, too. */
function listVerdicts() {
  const had = new Set(DATA.others.map((one) => one[VERDICT]));
  return DATA.verdicts.map(([name]) => name).filter((name, n) => had.has(n) && !DATA.states.includes(name));
}

function start() {
  fill("family", DATA.families.map((name) => [name]));
  for (const id of ["model", "my-model"]) fill(id, DATA.models);
  fill("hardware", DATA.hardware.map(([id]) => [id]));
  fill("my-hardware", DATA.hardware.map(([id, name, , memory]) => [id, memory ? `${name}, ${memory} GiB` : name]));
  fill("program", DATA.programs.length ? [["quantmatrix"], ...DATA.programs.map(([id]) => [id])] : []);
  find("program").parentElement.hidden = !DATA.programs.length;
  fill("state", [...DATA.states, ...listVerdicts()].map((name) => [name]));
  fill("scope", DATA.scopes.map((name) => [name]));
  find("counts").append(...countLabels());
  find("answer-head").append(...ANSWER_HEAD.map((title, n) =>
    n ? make("th", { scope: "col" }, title) : make("td", {})));
  for (const id of ["filters", "question"]) {
    find(id).addEventListener("submit", (event) => event.preventDefault());
  }
  find("filters").addEventListener("reset", () => setTimeout(applyFilters));
  for (const event of ["input", "change"]) { // some programs that choose for a reader send but one
    find("filters").addEventListener(event, applyFilters);
    find("question").addEventListener(event, answerAgain);
  }
  find("all").addEventListener("click", () => {
    find("filters").reset();
    find("text").focus();
  });
  find("more").addEventListener("click", drawMore);
  find("cell").addEventListener("close", () => keepAddress());
  addEventListener("hashchange", readAddress);
  addEventListener("beforeprint", drawAll);
  find("matrix").addEventListener("scroll", drawNearEnd, { passive: true });
  startSpeed();
  readAddress();
}

start();
