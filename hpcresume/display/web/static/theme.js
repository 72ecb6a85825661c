// Light, dark, or as the system has it.

const CHOICES = ["auto", "light", "dark"];
const KEY = "hpcresume-theme";

function remembered() {
  try {
    return localStorage.getItem(KEY) ?? "auto";
  } catch {
    return "auto"; // A page that was opened from a file may keep nothing.
  }
}

export function setUpTheme(button, changed) {
  let choice = CHOICES.includes(remembered()) ? remembered() : "auto";
  const apply = () => {
    document.documentElement.dataset.theme = choice;
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[choice];
    button.setAttribute("aria-label", `Colours: ${choice}. Change.`);
    changed();
  };
  button.addEventListener("click", () => {
    choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    try {
      localStorage.setItem(KEY, choice);
    } catch {
      // It holds for this visit.
    }
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
