"""The documentation site: what MkDocs does not find in docs/ is made here while it builds (`make site`)."""
