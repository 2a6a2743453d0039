// A badge on the "About" page of the settings. Everything else in this pack works without JavaScript.
import { app } from "../../../scripts/app.js";

app?.registerExtension?.({
  name: "cviv-vae.about",
  aboutPageBadges: [
    {
      label: "CV/IV-VAE: official weights",
      url: "https://huggingface.co/AILab-CVC/CV-VAE",
      icon: "pi pi-video",
    },
  ],
});
