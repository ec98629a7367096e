# SPDX-License-Identifier: Apache-2.0
"""The site says where its code is, and nothing where nobody could open it."""

WEB = "https://forge.example/someone/a-project"


def test_pages_lead_to_the_code_and_to_their_own_source(site):
    site.environment |= {
        "GITHUB_SERVER_URL": "https://forge.example", "GITHUB_REPOSITORY": "someone/a-project",
    }  # fmt: skip
    site.write("docs/index.md", "# Home\n\n```{toctree}\nguides/one\n```\n")
    site.write("docs/guides/one.md", "# One\n\nText.\n\n## Two\n\nText.\n")
    built = site.build()
    assert built.code == 0, built.text
    links = {a["href"] for a in built.page("guides/one.html").select("a[href^='https://forge']")}
    assert links == {WEB, f"{WEB}/edit/main/docs/guides/one.md"}


def test_nothing_is_said_where_there_is_no_address(site):
    site.write("docs/index.md", "# Home\n")
    built = site.build()
    assert built.code == 0, built.text
    assert "Source code" not in built.page("index.html").get_text()
