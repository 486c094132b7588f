"""The course that tools/workshop.py writes; this file is copied beside its gradebook.

nbgrader's own steps but one: it clears every output of a student's copy, and here only those of exercises go.
"""

from nbconvert.preprocessors import TagRemovePreprocessor
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearSolutions,
    ComputeChecksums,
    LockCells,
    SaveCells,
)

c = get_config()
c.CourseDirectory.course_id = "attention"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "student"
c.NbGrader.logfile = ""
c.ClearSolutions.code_stub = {"python": ""}  # the starting cell above the solution is the stub
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_all_outputs_tags = {"exercise"}
c.GenerateAssignment.preprocessors = [
    LockCells,
    ClearSolutions,
    TagRemovePreprocessor,
    CheckCellMetadata,
    ComputeChecksums,
    SaveCells,
    ClearHiddenTests,
    ComputeChecksums,
    CheckCellMetadata,
]
c.ExecutePreprocessor.timeout = 600
