"""The web page in a real browser, against scripted endpoints."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import Browser, Keys, WebElement
from tests.e2e.page_script import HOSTILE, MODEL, Script, card


def answers(chat: Browser, text: str) -> None:
    """Waits until this is the last answer."""
    chat.becomes(lambda: chat.text(".from-assistant .message-body"), text)


def test_an_answer_and_what_it_cost(chat: Browser, script: Script) -> None:
    assert chat.ask("Hi there") == "Hello world."
    assert chat.text(".from-assistant strong") == "world"
    # Tokens that arrive in one read have no rate.
    assert re.match(r"3 tokens · ([\d.,]+ tokens/s · )?first token after ", chat.text(".stats"))
    assert script.requests[0]["messages"] == [{"role": "user", "content": "Hi there"}]
    assert script.requests[0]["stream_options"] == {"include_usage": True}


def test_the_conversation_goes_on_and_is_kept(chat: Browser, script: Script) -> None:
    chat.ask("one")
    chat.ask("two")
    assert [message["content"] for message in script.requests[1]["messages"]] == ["one", "Hello **world**.", "two"]
    chat.reload()
    chat.becomes(lambda: len(chat.all(".message")), 4)
    answers(chat, "Hello world.")
    chat.open(script.url)
    chat.gone(".message")
    chat.click(".conversations a")
    chat.becomes(lambda: len(chat.all(".message")), 4)


def test_settings_go_into_requests(chat: Browser, script: Script) -> None:
    numbers = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "max_completion_tokens": 99}
    numbers |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
    for name, value in numbers.items():
        chat.set(name, value)
    chat.set("system", "Be brief.")
    chat.set("stop", "END\n\\n\\n")
    chat.set("extra", '{"ignore_eos": true}')
    chat.ask("hi")
    request = script.requests[0]
    assert {name: request[name] for name in numbers} == numbers
    assert request["stop"] == ["END", "\n\n"] and request["ignore_eos"] is True
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    chat.click("#settings-toggle")
    chat.click("#settings-reset")
    chat.ask("again")
    assert not set(script.requests[1]) & {*numbers, "stop", "ignore_eos"}


def test_a_setting_that_is_not_valid_is_not_sent(chat: Browser, script: Script) -> None:
    chat.set("extra", "{")
    chat.send("hi")
    chat.becomes(chat.focused, "setting-extra")
    chat.becomes(lambda: chat.text("#setting-extra-hint"), "This is not valid JSON.")
    assert not script.requests


def test_stop(chat: Browser, script: Script) -> None:
    script.says(*["word "] * 40, then_waits=True)
    num_left = script.num_left
    chat.send("go on")
    chat.wait(lambda: "word word" in chat.text(".from-assistant .message-body"))
    chat.type(Keys.ESCAPE)
    chat.finish()
    chat.wait(lambda: "stopped" in chat.text(".stats"))
    shown = chat.text(".from-assistant .message-body")
    chat.wait(lambda: script.num_left > num_left, "the server to notice")
    script.go_on()
    assert chat.text(".from-assistant .message-body") == shown
    script.says("Fine.")
    assert chat.ask("and now") == "Fine."


def test_two_conversations_at_once(chat: Browser, script: Script) -> None:
    script.says(*["a "] * 60, then_waits=True)
    chat.send("first")
    chat.wait(lambda: "a a" in chat.text(".from-assistant .message-body"))
    chat.click("#new-chat")
    script.says("b")
    assert chat.ask("second") == "b"
    script.go_on()
    chat.gone(".running-dot")
    # The one that ended last comes first.
    chat.click(".conversations li:first-child a")
    answers(chat, " ".join(["a"] * 60))


def test_an_answer_that_was_edited_has_no_price(chat: Browser, script: Script) -> None:
    """What it cost was another text's."""
    chat.ask("one")
    assert "3 tokens" in chat.text(".stats")
    for _ in range(2):
        chat.run("document.querySelector('.from-assistant [aria-label=\"Edit answer\"]').click()")
        chat.type(Keys.CONTROL, "a", Keys.NULL, "Mine.", Keys.CONTROL, Keys.ENTER)
        answers(chat, "Mine.")
        chat.becomes(lambda: chat.text(".stats"), "edited")
        chat.reload()
        answers(chat, "Mine.")
    chat.click('[aria-label="Regenerate answer"]')
    chat.finish()
    assert chat.wait(lambda: "3 tokens" in (text := chat.text(".stats")) and "edited" not in text)


def test_the_message_field_has_the_focus(chat: Browser, script: Script) -> None:
    """One may type at once, except where a keyboard would come up and hide half of the page."""
    for place in ("", "#chat"):
        chat.open(f"{script.url}/{place}")
        chat.becomes(chat.focused, "composer-input")
    chat.type("Hi", Keys.ENTER)
    chat.finish()
    assert script.requests[-1]["messages"] == [{"role": "user", "content": "Hi"}]
    chat.reload()
    chat.becomes(chat.focused, "composer-input")


def test_icons_stay_when_the_server_is_gone(chat: Browser) -> None:
    """Nothing that is drawn later is fetched."""
    chat.ask("hi")
    chat.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    try:
        chat.run("document.querySelector('.from-user [aria-label=\"Edit message\"]').click()")
        chat.send("more")
        chat.wait(lambda: chat.all("#messages .error-box .icon"))
        empty = "return document.querySelectorAll('svg.icon:not(:has(path, rect, circle)), use').length"
        chat.becomes(partial(chat.run, empty), 0)
    finally:
        chat.driver.delete_network_conditions()


FORMULAS = r"""
The roots of $ax^2 + bx + c = 0$ are

$$
x_{1,2} = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}
$$

and \(e^{i\pi} = -1\) costs $5, not $6. Also

\[ \int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}, \qquad
\begin{pmatrix} a & b \\ c & d \end{pmatrix} \]

- in a list $\sum_{k=1}^n k$
- wrong: $\frac{1$
"""


def test_formulas(chat: Browser, script: Script) -> None:
    """They are set by KaTeX, under the page's policy; what it does not understand stays as it was written."""
    script.deltas = [{"content": FORMULAS[at : at + 5]} for at in range(0, len(FORMULAS), 5)]
    chat.ask("math")
    chat.becomes(lambda: len(chat.all(".formula.is-set .katex")), 5)
    chat.becomes(lambda: len(chat.all(".formula.block.is-set .katex-display")), 2)
    assert "costs $5, not $6." in chat.text(".from-assistant .message-body")
    chat.becomes(lambda: chat.texts(".formula:not(.is-set)"), ["\\frac{1"])
    fonts = "return document.fonts.ready.then(() => [...document.fonts].filter((f) => f.status === 'loaded').length)"
    assert chat.wait(lambda: chat.run(fonts) >= 3)
    styled = "return [...document.querySelectorAll('.katex-html [style]')].map((n) => n.getAttribute('style'))"
    assert any("vertical-align" in style for style in chat.run(styled))  # the policy let it through
    if (folder := os.environ.get("OCTAVO_SCREENSHOTS")) is not None:
        chat.driver.save_screenshot(f"{folder}/formulas.png")


def test_rename_export_delete(chat: Browser, tmp_path: Path) -> None:
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    chat.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    chat.ask("A question")
    chat.run("document.querySelector('[aria-label^=Rename]').click()")
    chat.type(Keys.CONTROL, "a", Keys.NULL, "New/ name", Keys.ENTER)
    chat.becomes(lambda: chat.texts(".conversation-title"), ["New/ name"])
    chat.run("document.querySelector('[aria-label^=Export]').click()")
    file = tmp_path / "New-name.json"
    exported = chat.wait(lambda: json.loads(file.read_text()))  # the browser makes the file, then fills it
    assert [message["content"] for message in exported["messages"]] == ["A question", "Hello **world**."]
    chat.run("document.querySelector('[aria-label^=Delete]').click()")
    chat.gone(".message", ".conversation-title")
    chat.click(".notice button")
    chat.becomes(lambda: chat.texts(".conversation-title"), ["New/ name"])


def test_models_and_adapters(chat: Browser, script: Script) -> None:
    script.models = [card(), card(f"lora {HOSTILE}", parent=MODEL)]
    chat.reload()
    chat.becomes(lambda: chat.attribute("#model optgroup", "label"), f"Adapters for {MODEL}")
    chat.run("const s = document.getElementById('model'); s.selectedIndex = 1; s.dispatchEvent(new Event('change'))")
    chat.ask("hi")
    assert script.requests[0]["model"] == f"lora {HOSTILE}"
    assert chat.driver.title == "Octavo"


def test_errors_are_shown_and_can_be_tried_again(chat: Browser, script: Script) -> None:
    script.status = 400
    chat.send(f"hi {HOSTILE}")
    chat.wait(lambda: chat.text(".error-box p").startswith("No <b><img"))
    script.says("Half an", " answer")
    script.deltas.insert(1, {"error": {"message": "the engine stopped", "code": 500}})
    chat.click(".error-box button")
    chat.wait(lambda: "The engine stopped." in chat.text(".error-box p"))
    answers(chat, "Half an")
    script.says("Whole.")
    chat.click(".error-box button")
    chat.finish()
    answers(chat, "Whole.")
    chat.gone("#messages .error-box")
    assert chat.driver.title == "Octavo"


def test_reasoning_is_folded(chat: Browser, script: Script) -> None:
    script.deltas = [{"reasoning": "Let me *think*."}, {"content": "Done."}]
    assert chat.ask("hm") == "Done."
    assert not chat.all(".reasoning-text p")
    chat.click(".reasoning summary")
    chat.becomes(lambda: chat.text(".reasoning-text"), "Let me think.")  # the event `toggle` comes later
    chat.ask("next")
    assert script.requests[1]["messages"][1] == {"role": "assistant", "content": "Done."}


def test_tool_calls_and_their_results(chat: Browser, script: Script) -> None:
    def piece(text: str, **more: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "function": {"arguments": text, **more.pop("function", {})}, **more}]}

    script.deltas = [piece('{"city": ', id="call-1", function={"name": "weather"}), piece('"Paris"}')]
    chat.ask("weather?")
    chat.becomes(lambda: chat.text(".tool-call p"), "Call to weather")
    assert json.loads(chat.text(".tool-call pre")) == {"city": "Paris"}
    script.says("Sunny.")
    chat.fill(".tool-results textarea", "25 degrees")
    chat.click(".tool-results button")
    chat.finish()
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    assert script.requests[1]["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "25 degrees"},
    ]


def test_works_below_a_path(chat: Browser, script: Script) -> None:
    chat.open(f"{script.url}/behind/a/proxy/")
    assert chat.ask("hi") == "Hello world."
    chat.run("document.querySelector('.views a:last-child').click()")
    chat.wait(lambda: chat.driver.current_url.endswith("/behind/a/proxy/docs"))
    chat.click(".views a:first-child")
    chat.wait(lambda: chat.driver.current_url.endswith("/behind/a/proxy/#chat"))


# -- text of a model is text -------------------------------------------------------------------------------------

ATTACKS = f"""
# {HOSTILE}

{HOSTILE} **{HOSTILE}** `{HOSTILE}` [{HOSTILE}](https://example.org/"onmouseover="x)
[a](javascript:document.title='hacked') [b](JaVaScRiPt&#58;alert) [c](data:text/html,{HOSTILE}) [d](vbscript:x)
[e](java\nscript:alert) [f](  javascript:alert) [g](//evil.example) [h](/v1/models) [i](file:///etc/passwd)
<javascript:alert(1)> <https://ok.example/"><script>document.title='hacked'</script>
![picture](https://evil.example/x.png) ![]({HOSTILE}) <iframe src="https://evil.example"></iframe>
<svg onload="document.title='hacked'"><style>body {{ display: none }}</style><base href="https://evil.example/">
&lt;script&gt;document.title='hacked'&lt;/script&gt; <a href="javascript:alert(1)">x</a> https://ok.example/?q=<b>

| {HOSTILE} | b |
|---|---|
| {HOSTILE} | <td onclick="x"> |

> {HOSTILE}

- {HOSTILE}

$${HOSTILE}$$

```html" onload="x {HOSTILE}
{HOSTILE}
```
"""

LOOK = """
    const place = document.getElementById("messages");
    const nodes = [...place.querySelectorAll("*")];
    return {
      tags: [...new Set(nodes.map((node) => node.localName))],
      attributes: [...new Set(nodes.filter((node) => !node.closest(".katex")).flatMap((node) =>
        [...node.attributes].map(({ name }) => name)))],
      formulas: [...new Set([...place.querySelectorAll(".katex *")].flatMap((node) =>
        [...node.attributes].map(({ name }) => name)))],
      links: [...place.querySelectorAll("a")].map((node) => [node.protocol, node.rel, node.target]),
    };
"""


def test_hostile_text_is_inert(chat: Browser, script: Script) -> None:
    script.deltas = [{"reasoning": ATTACKS}]
    script.deltas += [{"content": ATTACKS[at : at + 7]} for at in range(0, len(ATTACKS), 7)]
    call = {"index": 0, "id": HOSTILE, "function": {"name": HOSTILE, "arguments": json.dumps({"x": HOSTILE})}}
    script.deltas.append({"tool_calls": [call]})
    chat.ask(HOSTILE)
    chat.click(".reasoning summary")
    chat.wait(lambda: chat.text(".reasoning-text").count("hacked") > 9)
    seen = chat.run(LOOK)
    assert not {"script", "img", "iframe", "style", "base", "object", "embed", "link"} & set(seen["tags"])
    assert not [name for name in seen["attributes"] if name.startswith("on") or name in ("style", "srcdoc", "src")]
    assert not [name for name in seen["formulas"] if name.startswith("on") or name in ("srcdoc", "src", "href")]
    assert seen["links"]
    for protocol, rel, target in seen["links"]:
        assert protocol in ("http:", "https:", "mailto:") and "noopener" in rel and target == "_blank"
    assert chat.driver.title == "Octavo"
    chat.wait(lambda: "<img" in chat.text(".conversation-title"))
    chat.reload()
    chat.becomes(lambda: len(chat.all(".message")), 2)
    assert chat.driver.title == "Octavo"


def test_the_policy_of_the_page_forbids_what_slips_through(chat: Browser) -> None:
    """Should some text ever become markup, it still does nothing."""
    refused = """
        const attempts = [
          () => { document.createElement("div").innerHTML = "<b>x</b>"; },
          () => { document.createElement("img").setAttribute("onerror", "document.title = 'hacked'"); },
          () => { document.createElement("script").textContent = "document.title = 'hacked'"; },
          () => { setTimeout("document.title = 'hacked'"); },
        ];
        return attempts.map((attempt) => { try { attempt(); return null; } catch (error) { return error.name; } });
    """
    assert set(chat.run(refused)) <= {"TypeError", "EvalError"}
    picture = "const img = new Image(); img.src = 'http://127.0.0.1:9/x.png'; document.body.append(img);"
    chat.run(picture)
    complaints = chat.wait(lambda: [line for line in chat.errors() if "x.png" in line])
    assert "Content Security Policy" in complaints[0]
    assert chat.driver.title == "Octavo"
    chat.open("about:blank")
    chat.errors()  # another complaint about the same may have come since


RENDER = """
    const place = document.createElement("div");
    const view = new module.MarkdownView(place);
    const [text, step] = values;
    for (let at = step; at < text.length; at += step) view.update(text.slice(0, at));
    view.update(text);
    for (const copy of place.querySelectorAll(".code-head")) copy.remove();
    for (const node of place.querySelectorAll(".formula")) {
      node.textContent = node.dataset.source;
      node.removeAttribute("data-source");
      node.classList.remove("is-set");
    }
    for (const node of place.querySelectorAll("a, [class^=heading], th, td, p, li")) {
      if (!node.className.startsWith("align")) node.removeAttribute("class");
      for (const name of ["rel", "target", "title"]) node.removeAttribute(name);
    }
    return place.innerHTML;
"""
MARKDOWN = [
    ("a *b* **c** ***d*** _e_ __f__ ~~g~~ `h`", "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> "
     "<em>e</em> <strong>f</strong> <del>g</del> <code>h</code></p>"),
    ("snake_case_name and 2 * 3 * 4 and **open", "<p>snake_case_name and 2 * 3 * 4 and **open</p>"),
    ("**interval [0, 1)** x", "<p><strong>interval [0, 1)</strong> x</p>"),
    ("**强调**文字 **“引”**文", "<p><strong>强调</strong>文字 <strong>“引”</strong>文</p>"),
    ("one\ntwo  \nthree\\\nfour", "<p>one<br>two<br>three<br>four</p>"),
    ("# One\n\n### Three ###\n\nTwo\n---", "<h3>One</h3><h5>Three</h5><h4>Two</h4>"),
    ("- a\n- b\n  - c\n    1. d\n- e", "<ul><li>a</li><li>b<ul><li>c<ol><li>d</li></ol></li></ul></li><li>e</li></ul>"),
    ("1. a\n   - b\n2. c\n\ntext", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol><p>text</p>"),
    ("3. a\n\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("- a\n\n      code\n- b\nlazy", '<ul><li><p>a</p><div class="code-block"><pre tabindex="0"><code>code</code>'
     "</pre></div></li><li><p>b<br>lazy</p></li></ul>"),
    ("in\n1984. that year", "<p>in<br>1984. that year</p>"),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n\n---\n\nb\n***", "<p>a</p><hr><p>b</p><hr>"),
    ("~~~\na <b>\n\n```\n~~~\nz", '<div class="code-block"><pre tabindex="0"><code>a &lt;b&gt;\n\n```</code></pre>'
     "</div><p>z</p>"),
    ("```\nnot closed", '<div class="code-block"><pre tabindex="0"><code>not closed</code></pre></div>'),
    ("|a|b|\n|-|-:|\n|1|2\\|3|\n|x|\n\nz", '<div class="table-frame" tabindex="0" role="region" aria-label="Table">'
     '<table><thead><tr><th>a</th><th class="align-right">b</th></tr></thead><tbody><tr><td>1</td>'
     '<td class="align-right">2|3</td></tr><tr><td>x</td><td class="align-right"></td></tr></tbody></table></div>'
     "<p>z</p>"),
    ("[a *b*](https://x.example/(c) \"t\") [d](e) [f]", '<p><a href="https://x.example/(c)">a <em>b</em></a> '
     "<span>d</span> [f]</p>"),
    ("see https://x.example/a_b_c. (http://y.example) <mailto:a@b.example>", '<p>see <a href="https://x.example/a_b_c">'
     'https://x.example/a_b_c</a>. (<a href="http://y.example/">http://y.example</a>) '
     '<a href="mailto:a@b.example">a@b.example</a></p>'),
    ("`` a ` b `` \\*c\\* &amp; &lt;d> &nope; a<br>b", "<p><code>a ` b</code> *c* &amp; &lt;d&gt; &amp;nope; "
     "a<br>b</p>"),
    ("x \\(a_1 * b_2\\) y", '<p>x <span class="formula">a_1 * b_2</span> y</p>'),
    ("$$\na^2\n$$", "<p>a^2</p>"),
    ("\\[\na_1*b*\n\\]", "<p>a_1*b*</p>"),
    ("x $a_1 * b_2$, $n$-th $$y$$.", '<p>x <span class="formula">a_1 * b_2</span>, <span class="formula">n</span>-th '
     '<span class="formula block">y</span>.</p>'),
    ("$5 and $6, US$5-$10, $5 or less, not 6$, $3.50/$4", "<p>$5 and $6, US$5-$10, $5 or less, not 6$, $3.50/$4</p>"),
    ("`$a$` \\$b$ $ c$ $d $ $HOME/$PATH $e", "<p><code>$a$</code> $b$ $ c$ $d $ $HOME/$PATH $e</p>"),
    ("$3 x + 4$ $\\$5$ **$f$**", '<p><span class="formula">3 x + 4</span> <span class="formula">\\$5</span> '
     '<strong><span class="formula">f</span></strong></p>'),
    ("[a]( <b c> 'd' ) [e](f (g)) [h]( i(j) ) ![k](https://l.example)", '<p><span>a</span> [e](f (g)) <span>h</span> '
     '<a href="https://l.example/">k</a></p>'),
    ("- [x] done", '<ul><li><input type="checkbox" disabled="" aria-label="done"> done</li></ul>'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "html"), MARKDOWN)
def test_markdown(chat: Browser, text: str, html: str) -> None:
    assert chat.module("markdown.js", RENDER, text, len(text) + 1) == html
    # However it comes in, the same is there in the end.
    assert chat.module("markdown.js", RENDER, text, 1) == html


def test_code_has_colours_and_no_other_letters(chat: Browser) -> None:
    text = "```python\ndef f(x):  # a comment\n    return 'text' + 0x1f\n```"
    html = chat.module("markdown.js", RENDER, text, 5)
    assert '<span class="syntax-keyword">def</span>' in html
    assert '<span class="syntax-comment"># a comment</span>' in html
    assert "<span class=\"syntax-string\">'text'</span>" in html
    assert '<span class="syntax-number">0x1f</span>' in html


TANGLED = [
    "*a " * 30000, "**" * 30000, "_a*b" * 20000, "~~a" * 20000, "[" * 60000, "[a](" * 20000, "![" * 30000,
    "![a](" * 90000, ("![a](" * 400 + ")") * 75, "[a](<" * 20000, "[a](x '" * 20000, "[a]( " * 20000, "$a " * 30000,
    "\\(x\\)" * 3000, "$" + "\\sqrt" * 600 + "x$", "$" + "{" * 3000 + "$", "$\\def\\a{\\a\\a}\\a$", "$x_" * 30000,
    "`" + "a``" * 20000, "<" * 60000, "\\(" * 30000, "$$" * 30000, "&" * 60000, "> " * 30000 + "x", "- " * 30000 + "x",
    "  " * 50000 + "x", "|" * 60000 + "\n" + "|-" * 60000, "```" + " " * 60000 + "`", "# " + "#" * 60000,
    "https://x/" + "(" * 60000, "1. a\n" * 15000, "\n> a\n- b" * 8000, "a\n|\n" * 15000,
    "".join(f"{'  ' * i}- a\n" for i in range(300)), "```c\n" + "/*" * 14000 + "\n```",
    "```js\n" + '"\\' * 14000 + "\n```", "*" + "[x](https://e.example)" * 5000,
]  # fmt: skip


def test_tangled_text_costs_little(chat: Browser) -> None:
    body = """
        const place = document.createElement("div");
        new module.MarkdownView(place).update(values[0]);
        const depth = (node) => 1 + Math.max(0, ...[...node.children].slice(0, 100).map(depth));
        return depth(place);
    """
    for text in TANGLED:
        begin = chat.cpu_seconds()
        assert chat.module("markdown.js", body, text) < 120, text[:20]
        assert chat.cpu_seconds() - begin < 3, text[:20]


# -- looks and hands ---------------------------------------------------------------------------------------------

BACKGROUND = "return getComputedStyle(document.documentElement).backgroundColor"


def brightness(browser: Browser) -> int:
    numbers = browser.run(BACKGROUND).removeprefix("rgb(").removesuffix(")").split(",")
    return sum(map(int, numbers)) // 3


def test_dark_and_light(chat: Browser) -> None:
    chat.wait(lambda: brightness(chat) > 230)
    chat.prefer("dark")
    chat.wait(lambda: brightness(chat) < 40)
    chat.click("#theme-toggle")
    chat.wait(lambda: brightness(chat) > 230)
    chat.reload()
    chat.wait(lambda: brightness(chat) > 230)
    chat.click("#theme-toggle")
    chat.wait(lambda: brightness(chat) < 40)
    chat.prefer("light")  # the choice was that of the system, so the page follows it
    chat.wait(lambda: brightness(chat) > 230)


CONTRAST = """
    const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const probe = document.body.appendChild(document.createElement("i"));
    const light = (name) => {
      probe.style.color = `var(${name})`;
      const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number).map(channel);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratios = arguments[0].map(([text, ground]) => {
      const [low, high] = [light(text), light(ground)].sort((a, b) => a - b);
      return [text, ground, (high + 0.05) / (low + 0.05)];
    });
    probe.remove();
    return ratios;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(chat: Browser, scheme: str) -> None:
    chat.prefer(scheme)
    chat.wait(lambda: (brightness(chat) < 128) == (scheme == "dark"))
    grounds = ["--page", "--side", "--surface", "--raised", "--hover", "--said", "--code", "--code-head"]
    pairs = [(text, ground) for text in ("--text", "--text-quiet") for ground in grounds]
    pairs += [("--accent", ground) for ground in ("--page", "--side", "--surface", "--accent-soft")]
    pairs += [("--on-accent", "--accent"), ("--danger", "--danger-soft"), ("--danger", "--surface")]
    pairs += [(f"--syntax-{kind}", "--code") for kind in ("keyword", "string", "number", "comment")]
    for text, ground, ratio in chat.run(CONTRAST, pairs):
        assert ratio >= 4.5, (text, ground, ratio)
    for text, ground, ratio in chat.run(CONTRAST, [(f"--series-{i}", "--surface") for i in (1, 2)]):
        assert ratio >= 3, (text, ground, ratio)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(chat: Browser, script: Script, width: int) -> None:
    script.says("a" * 400, "\n\n```\n" + "b" * 400 + "\n```\n\n", "|" + "c" * 90 + "|d|\n|-|-|\n|1|2|\n")
    chat.ask("x" * 300)
    chat.resize(width, 700)
    for place in ("", "#dashboard", "docs"):
        chat.open(f"{script.url}/{place}" if place else chat.driver.current_url)
        chat.wait(lambda: chat.run("return document.readyState === 'complete' && document.body.innerText.length > 20"))
        chat.wait(lambda: chat.run("return document.documentElement.scrollWidth") <= width, f"no more width at {place}")


def test_side_panels_on_a_phone(chat: Browser) -> None:
    chat.resize(360, 700)
    chat.reload()
    for name in ("sidebar", "settings"):
        contains = f"return document.getElementById('{name}').contains(document.activeElement)"
        chat.hidden(f"#{name}")
        chat.click(f"#{name}-toggle")
        chat.find(f"#{name}")
        chat.becomes(partial(chat.run, "return document.getElementById('talk').inert"), True)
        chat.becomes(partial(chat.run, contains), True)
        chat.type(Keys.ESCAPE)
        chat.hidden(f"#{name}")
        chat.becomes(chat.focused, f"{name}-toggle")


def test_keyboard(chat: Browser) -> None:
    order = []

    def go_on() -> WebElement:
        chat.type(Keys.TAB)
        return chat.driver.switch_to.active_element

    while go_on().tag_name != "body":  # past the last element is the begin
        pass
    while (found := go_on()).tag_name != "body":
        order.append(found.get_attribute("id") or found.text or found.tag_name)
        outline = chat.run("return getComputedStyle(arguments[0]).outlineStyle", found)
        assert outline != "none" or order[-1] == "composer-input"
    assert order[0] == "skip-link"
    steps = ["sidebar-toggle", "Dashboard", "theme-toggle", "new-chat", "composer-input", "model", "settings-toggle"]
    assert [step for step in order if step in steps] == steps
    chat.fill("#composer-input", "one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    chat.becomes(lambda: chat.attribute("#composer-input", "value"), "one\ntwo")


def test_everything_has_a_name(chat: Browser) -> None:
    """Buttons and fields say what they are to those who do not see them."""
    chat.ask("hi")
    chat.click("#settings-toggle")
    nameless = """
        return [...document.querySelectorAll("button, input, select, textarea, a, [role=img]")].filter((node) => {
          const label = node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.[0]?.textContent;
          return !label && !node.closest("[aria-hidden]");
        }).map((node) => node.outerHTML);
    """
    assert chat.run(nameless) == []


def test_the_dashboard_lists_models_and_adapters(chat: Browser, script: Script) -> None:
    script.models = [
        card(capabilities={"vision": True}),
        card(f"poet {HOSTILE}", parent=MODEL),
        card("pirate", parent=MODEL),
    ]
    old, now = 'waiting_lora_adapters="pirate",running_lora_adapters=""', 'running_lora_adapters="pirate,x"'
    script.metrics = f"vllm:lora_requests_info{{{old}}} 5\nvllm:lora_requests_info{{{now}}} 6\n"
    chat.open(f"{script.url}/#dashboard")
    rows = [
        f"{MODEL} Base model 4,096 tokens Text, images",
        f"poet {HOSTILE} Adapter of {MODEL} 4,096 tokens Text",
        f"pirate Adapter of {MODEL} 4,096 tokens Text running",
    ]
    chat.becomes(lambda: chat.texts(".models tbody tr"), rows)
    assert chat.driver.title == "Dashboard – Octavo"


# -- metrics -----------------------------------------------------------------------------------------------------


def test_reading_metrics(chat: Browser) -> None:
    before = 'a_total{model="x\\"y,\\n}"} 5\na_total{model="z"} 1.5e1\n'
    before += 'h_bucket{le="1.0"} 2\nh_bucket{le="2.0"} 2\nh_bucket{le="+Inf"} 2\n'
    after = '# HELP a_total x\na_total 30\nh_bucket{le="+Inf"} 12\nh_bucket{le="1.0"} 7\nh_bucket{le="2.0"} 12\n'
    body = """
        const [one, two] = [new module.Reading(values[0], 10), new module.Reading(values[1], 12)];
        const buckets = module.newBuckets("h", one, two);
        return [
          one.all("a_total")[0].labels.model, one.sum("a_total"), module.rate("a_total", one, two),
          module.increase("a_total", two, one), [0.25, 0.5, 0.75, 1].map((share) => module.quantile(share, buckets)),
          Number.isNaN(module.quantile(0.5, [])), Number.isNaN(one.sum("missing")),
          module.quantile(0.99, [[1, 1], [Infinity, 9]]),
        ];
    """
    values = chat.module("prometheus.js", body, before, after)
    assert values == ['x"y,\n}', 20, 5, 20, [0.5, 1, 1.5, 2], True, True, 1]
