function start() {
  fill("family", DATA.families.map((name) => [name]));
  for (const id of ["model", "my-model"]) fill(id, DATA.models);
  fill("hardware", DATA.hardware.map(([id]) => [id]));
  fill("my-hardware", DATA.hardware.map(([id, name, , memory]) => [id, memory ? `${name}, ${memory} GiB` : name]));
  fill("state", DATA.states.map((name) => [name]));
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
