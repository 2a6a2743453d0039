// %Node.widget% and %date:...% in the file names of our nodes, as in those of ComfyUI's own saving nodes.
// Without this file dates still work: the server fills them in, too.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "cviv-vae.file-names",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("CVIV_")) return;
    const widget = node.widgets?.find((one) => one.name === "filename_prefix");
    const filled = window.comfyAPI?.utils?.applyTextReplacements;
    if (widget && filled) widget.serializeValue = () => filled(app, widget.value);
  },
});
