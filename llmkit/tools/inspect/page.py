"""Texts as one self-contained HTML page: a token is a box that tells its numbers, coloured by what the reader asks for."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from llmkit.tools.inspect.shown import Text

_STYLE = """
:root{--ink:#222;--paper:#fff;--line:#d5d8db;--soft:#f3f4f6}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#17191c;--line:#3a3d42;--soft:#22262a}}
*{box-sizing:border-box}body{font:15px/1.55 system-ui,sans-serif;margin:0 auto;max-width:76rem;padding:1rem;
color:var(--ink);background:var(--paper)}
h1{font-size:1.3rem;overflow-wrap:anywhere}h2{font-size:1rem;margin:1.2rem 0 .3rem}
pre.told{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:.6rem}
nav{position:sticky;top:0;background:var(--paper);padding:.5rem 0;border-bottom:1px solid var(--line);z-index:1}
nav button{font:inherit;margin:.1rem .3rem .1rem 0;padding:.15rem .6rem;border:1px solid var(--line);
background:var(--soft);color:inherit;border-radius:.3rem;cursor:pointer}
nav button[aria-pressed=true]{background:#2563c9;color:#fff}
#told{min-height:3.1em;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;border:1px solid var(--line);padding:.5rem;
border-radius:.3rem}
.text b{font-weight:normal;border-radius:.15rem;cursor:default}.text b.l{box-shadow:inset 0 -2px currentColor}
.text b:hover,.text b.at{outline:2px solid #2563c9}.text:focus-visible{outline:3px solid #2563c9}
"""
# Colours by role, readable on light and dark ground, each with an alpha so that the ground shows through.
_ROLE_COLOURS = {
    "control": "#a855f755",
    "system": "#d9770655",
    "user": "#0891b255",
    "assistant": "#16a34a55",
    "tool": "#2563eb55",
    "text": "#94a3b833",
    "hidden": "#dc262655",
    "padding": "#64748b33",
}
_SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent),roles=ROLES,told=document.getElementById('told');
const keys=['id','role','learnt','weight','position','document','label','value'];
let at=null;
const hue=n=>`hsl(${(n*137)%360} 70% 50% / .33)`;
const ways={role:t=>roles[t[1]],learnt:t=>t[2]?'#16a34a55':'#94a3b822',document:t=>t[5]<0?'#64748b33':hue(t[5]),
position:t=>`hsl(210 80% 50% / ${.06+.5*(t[4]%64)/64})`,
value:(t,m)=>t[7]===null?'#94a3b81a':`hsl(${t[7]<0?0:140} 75% 45% / ${.05+.75*Math.abs(t[7])/m})`};
function colour(way){for(const b of document.querySelectorAll('nav button'))b.setAttribute('aria-pressed',b.dataset.way===way);
document.querySelectorAll('.text').forEach((div,i)=>{const ts=data[i];
const m=Math.max(1e-9,...ts.map(t=>Math.abs(t[7]??0)));
[...div.children].forEach((b,j)=>b.style.background=ways[way](ts[j],m))})}
function tell(i,j){if(at)at.classList.remove('at');const div=document.querySelectorAll('.text')[i];at=div.children[j];
at.classList.add('at');div.dataset.at=j;
told.textContent=`token ${j}: `+JSON.stringify(at.dataset.t??at.textContent)+' · '+
keys.map((k,n)=>data[i][j][n]===null?'':`${k} ${data[i][j][n]}`).filter(Boolean).join(' · ')}
document.querySelectorAll('.text').forEach((div,i)=>{
div.onmouseover=div.onclick=e=>{if(e.target.tagName==='B')tell(i,[...div.children].indexOf(e.target))};
div.onfocus=()=>tell(i,+(div.dataset.at??0));
div.onkeydown=e=>{const step={ArrowRight:1,ArrowLeft:-1}[e.key];if(!step)return;e.preventDefault();
tell(i,Math.min(div.children.length-1,Math.max(0,+(div.dataset.at??0)+step)))}});
for(const b of document.querySelectorAll('nav button'))b.onclick=()=>colour(b.dataset.way);
colour('role');
"""
_MOST_TOKENS = 40_000  # on a page, so that it stays below 5 MB


def page(title: str, told: Sequence[str], texts: Sequence[Text]) -> str:
    """One HTML file without anything from elsewhere.

    Args:
        told: lines above the texts.
        texts: as many of them as fit are shown.
    """
    e = html.escape
    kept: list[Text] = []
    room = _MOST_TOKENS
    for text in texts:
        if len(text.tokens) > room:
            break
        kept.append(text)
        room -= len(text.tokens)
    has_values = any(token.value is not None for text in kept for token in text.tokens)
    ways = ["role", "learnt", "position", "document", *(["value"] if has_values else [])]
    note = "" if len(kept) == len(texts) else f"<p>The first {len(kept)} of {len(texts):,} texts."
    buttons = "".join(f"<button type=button data-way={way}>{way}</button>" for way in ways)
    swatches = " ".join(f"<span style='background:{c}'>&nbsp;{r}&nbsp;</span>" for r, c in _ROLE_COLOURS.items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{e(title)}</title><style>{_STYLE}</style><h1>{e(title)}</h1>",
        f"<pre class=told>{e(chr(10).join(told))}</pre>",
        f"<nav aria-label='colour by'>{buttons} {swatches} <u>learnt</u>",
        "<div id=told aria-live=polite>Point at a token, or go to a text with Tab and through it with the arrows.</div></nav>",
        note,
    ]
    for i, text in enumerate(kept):
        n_learnt = sum(token.learnt for token in text.tokens)
        padding = f", {text.n_padding} of padding behind it" if text.n_padding else ""
        heading = f"{text.title}: {len(text.tokens)} tokens, {n_learnt} learnt{padding}"
        boxes = "".join(f"<b{' class=l' if t.learnt else ''}>{e(_visible(t.text))}</b>" for t in text.tokens)
        parts.append(f"<h2 id=t{i}>{e(heading)}</h2><div class=text tabindex=0 aria-labelledby=t{i}>{boxes}</div>")
    rows = [
        [[t.id, t.role, int(t.learnt), _number(t.weight), t.position, t.document, t.label, _number(t.value)]
         for t in text.tokens] for text in kept
    ]  # fmt: skip
    data = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts.append(f"<script id=data type=application/json>{data}</script>")
    parts.append(f"<script>{_SCRIPT.replace('ROLES', json.dumps(_ROLE_COLOURS))}</script></html>")
    return "\n".join(parts) + "\n"


def _visible(text: str) -> str:
    """A line's end gets a sign, so that its box can be pointed at; what can't be seen is spelt."""
    return "".join(
        "\u21b5\n" if c == "\n" else c if c == "\t" or c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
