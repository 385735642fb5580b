"""/answers: the page on which a person asks the server, beside viewers that have no place for text.

One document without anything of a scan in it; its script asks the same server's /info, /datastore and /infer. What
comes back is shown as text, never as markup. `/answers?image=ID` opens it for one image: a viewer knows a series by it.
"""

import base64
import hashlib
from collections.abc import Awaitable, Callable
from html import escape

from app.evaluation.page import html_document
from app.serving.guard import Message, Receive, Send
from app.shared.version import VERSION

PATH = "/answers"

SCRIPT = """
"use strict";
const part = name => document.getElementById(name);
let models = {};
const checked = async response => {
  if (response.ok) return response;
  const detail = (await response.json().catch(() => ({}))).detail || {};
  const words = [detail.code, detail.message, detail.remedy].filter(word => word).join(". ");
  throw new Error(words || `the server answered ${response.status}`);
};
const shown = (title, text, kind) => {
  part("title").textContent = title;
  part("text").textContent = text;
  part("text").className = kind || "";
  part("result").hidden = false;
};
const field = (name, value) => {
  const label = document.createElement("label");
  label.textContent = name.replaceAll("_", " ");
  let input = document.createElement(Array.isArray(value) ? "select" : name === "question" ? "textarea" : "input");
  if (Array.isArray(value)) value.forEach(one => input.add(new Option(one, one)));
  else if (typeof value === "boolean") { input.type = "checkbox"; input.checked = value; }
  else input.value = value;
  input.name = name;
  label.append(input);
  return label;
};
const options = () => {
  const model = models[part("model").value] || {};
  part("about").textContent = model.description || "";
  part("options").replaceChildren(...Object.entries(model.config || {}).map(([name, value]) => field(name, value)));
};
const sent = () => Object.fromEntries([...part("options").querySelectorAll("[name]")].map(
  input => [input.name, input.type === "checkbox" ? input.checked : input.value]));
const offer = (name, bytes) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(bytes);
  link.download = link.textContent = name;
  part("files").append(link);
};
const ask = async event => {
  event.preventDefault();
  part("files").replaceChildren();
  part("more").textContent = "";
  part("send").disabled = true;
  shown("Asked", "The server is at work …", "quiet");
  try {
    const model = part("model").value, file = part("file").files[0], body = new FormData();
    const picture = model === "reconstruct" || model === "show_answer";
    const image = file ? "" : part("image").value.trim();
    if (!file && !image) throw new Error("name an image, or choose a file");
    body.append("params", JSON.stringify(sent()));
    if (file) body.append("file", file);
    const output = model === "reconstruct" ? "&output=image" : picture ? "" : "&output=json";
    const where = `infer/${encodeURIComponent(model)}?image=${encodeURIComponent(image)}${output}`;
    const response = await checked(await fetch(where, {method: "POST", body}));
    if (model === "reconstruct") {
      shown("Reconstruction", "HU on the scan's own grid: load it as a volume beside the scan.");
      offer("reconstruction.nii.gz", await response.blob());
      return;
    }
    const parts = picture ? await response.formData() : null;
    const answer = picture ? JSON.parse(parts.get("params")) : await response.json();
    const {npz, answer: words, question, notice, ...rest} = answer;
    if (picture) offer("where.nii.gz", parts.get("image"));
    if (npz) offer("tokens.npz", new Blob([Uint8Array.from(atob(npz), letter => letter.charCodeAt(0))]));
    shown(question || "Tokens", words === undefined ? `${answer.tokens} tokens` : words || "(no words)");
    part("more").textContent = JSON.stringify(rest, null, 1);
  } catch (error) {
    shown("Refused", error.message, "refused");
  } finally {
    part("send").disabled = false;
  }
};
const start = async () => {
  part("image").value = new URLSearchParams(location.search).get("image") || "";
  part("form").addEventListener("submit", ask);
  part("model").addEventListener("change", options);
  try {
    models = (await (await checked(await fetch("info/"))).json()).models;
    Object.keys(models).forEach(name => part("model").add(new Option(name, name)));
    if (models.ask) part("model").value = "ask";
    options();
    const all = await (await checked(await fetch("datastore/?output=all"))).json();
    Object.keys(all.objects || {}).forEach(name => part("images").append(new Option(name, name)));
  } catch (error) {
    shown("Refused", error.message, "refused");
  }
};
start();
"""
FORM = """
form{display:grid;gap:.9rem;max-width:40rem;margin:1rem 0}
label{display:grid;gap:.25rem;color:var(--quiet)}
input,select,textarea,button{font:inherit;color:var(--text);background:var(--panel);border:1px solid var(--edge);
border-radius:6px;padding:.45rem .6rem;width:100%}
input[type=checkbox]{width:auto;justify-self:start}
textarea{min-height:5rem}
button{cursor:pointer;font-weight:600}
#options{display:grid;gap:.9rem}
#text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:1.15rem}
#text.quiet{color:var(--quiet)}
#text.refused{color:var(--validation)}
#files a{display:inline-block;margin-right:1rem;color:var(--training)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;color:var(--quiet);font-size:.85rem}
"""
BODY = """\
<form id="form">
<label>image: an id of the server's, a folder below its studies, or a SeriesInstanceUID
<input id="image" list="images" autocomplete="off" spellcheck="false"><datalist id="images"></datalist></label>
<label>or a file: NIfTI, NRRD, MHA, a zip of a DICOM series, a token file <input id="file" type="file"></label>
<label>model <select id="model"></select></label>
<p id="about"></p>
<div id="options"></div>
<button id="send">Ask</button>
</form>
<section id="result" aria-live="polite" hidden><h2 id="title"></h2><p id="text"></p><p id="files"></p>
<details><summary>Where it came from</summary><pre id="more"></pre></details></section>
"""


def document() -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    rules = ("default-src 'none'", f"script-src 'sha256-{digest}'", "style-src 'unsafe-inline'", "img-src data:",
             "connect-src 'self'", "form-action 'none'", "base-uri 'none'")  # fmt: skip
    parts = {
        "head": "<h1>Ask about a scan</h1>",
        "body": BODY,
        "end": f"Voxelingo {escape(VERSION)}. Nothing is kept: an upload goes with its answer.",
        "more_style": FORM,
        "script": f"<script>{SCRIPT}</script>\n",
    }
    return html_document("Voxelingo: ask about a scan", escape("; ".join(rules), quote=True), **parts)


class AnswersPage:
    """Args: `app`: the ASGI application around which this lies; it answers everything else."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app, self.body = app, document().encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(self.body)).encode())]
        headers += [
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self.body})
