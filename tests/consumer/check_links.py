# SPDX-License-Identifier: Apache-2.0
"""check_links.py DIRECTORY: each link of a page leads to a file, and to a heading of it as GitHub names headings; and the
guide's contents have all of its headings. Addresses of the web aside."""
import pathlib
import re
import sys


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
             for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]
    return [f"{name}-{earlier}" if (earlier := names[:i].count(name)) else name for i, name in enumerate(names)]


def links(page):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]


root = pathlib.Path(sys.argv[1])
pages = [page for folder in (".", "docs", "python", "examples", "examples/*") for page in root.glob(folder + "/*.md")]
wrong = []
for page in pages:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or anchor and anchor not in anchors(target):
            wrong.append(f"{page}: {link} leads nowhere")
guide = root / "docs" / "guide.md"
wrong += [f"{guide}: #{name} is not in the contents" for name in anchors(guide)[1:] if "#" + name not in links(guide)]
if len(pages) < 10:
    wrong.append(f"only {len(pages)} pages at {root}")
if wrong:
    sys.exit("\n".join(wrong))
