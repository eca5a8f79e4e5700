"""From a template file to source text: catalog, template, space, ops."""
