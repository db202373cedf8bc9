// Runs first. It is no module, so it runs where modules cannot be loaded, and says so.

{
  const status = document.getElementById("status");
  status.textContent = "Loading the networks (18 MB).";

  if (location.protocol === "file:") {
    status.hidden = true;
    document.getElementById("server-hint").hidden = false;
  }
  document.getElementById("main-script").addEventListener("error", () => {
    status.classList.add("error");
    status.textContent = "A script of this page could not be loaded.";
  });
}
