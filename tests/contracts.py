"""A contract for import-linter that its own types cannot say: a package that stands alone."""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class AloneContract(Contract):
    """The package imports nothing of ours but itself and `except_for`, although it lies inside another package."""

    type_name = "alone"
    package = fields.ModuleField()
    except_for = fields.ListField(subfield=fields.ModuleField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Looks at every import of every module of the package."""
        name = self.package.name
        modules = {name, *graph.find_descendants(name)}
        allowed = {module.name for module in self.except_for or ()}
        found = {
            (module, other)
            for module in modules
            for other in graph.find_modules_directly_imported_by(module)
            if other not in modules and other not in allowed
        }
        return ContractCheck(kept=not found, metadata={"found": sorted(found)})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Names each import that should not be."""
        for module, other in check.metadata["found"]:
            output.print_error(f"{module} imports {other}")
