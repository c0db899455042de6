"""XSS vectors in a real page: the browser finds no more elements than the parser of the other tests."""
from belfry.messages.rendering import render
from tests.messages.test_rendering import ALLOWED, MENTIONED, VECTORS


def test_every_vector_is_rendered_as_text(visit) -> None:
    page = visit("/login")
    rendered = [str(render(vector, MENTIONED)) for vectors in VECTORS.values() for vector in vectors]
    found = page.evaluate(
        """(rendered) => {
            document.querySelector("main").innerHTML = rendered.join("");
            const elements = [...document.querySelectorAll("main *")];
            for (const element of elements)
                for (const kind of ["mouseover", "focus", "error", "load", "toggle"])
                    element.dispatchEvent(new Event(kind));
            return {
                tags: [...new Set(elements.map((element) => element.localName))],
                attributes: [...new Set(elements.flatMap((element) => element.getAttributeNames()))],
                schemes: [...new Set(elements.filter((element) => element.href).map((element) => element.protocol))],
            };
        }""",
        rendered,
    )
    assert set(found["tags"]) <= ALLOWED.keys()
    assert set(found["attributes"]) <= {"href", "rel", "class", "start"}
    # The protocol ":" stands for an invalid URL, which cannot be followed.
    assert set(found["schemes"]) - {":"} == {"http:", "https:", "mailto:"}
