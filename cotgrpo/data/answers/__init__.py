"""The answer in a reply, and whether it is the right one. docs/answers.md lists the rules."""

from cotgrpo.data.answers.comparison import answers_match as answers_match
from cotgrpo.data.answers.extraction import begins_with_number as begins_with_number
from cotgrpo.data.answers.extraction import extract_answer as extract_answer
from cotgrpo.data.answers.extraction import last_box as last_box
from cotgrpo.data.answers.grading import Grade as Grade
from cotgrpo.data.answers.grading import grade as grade
from cotgrpo.data.answers.replies import gold_answer as gold_answer
from cotgrpo.data.answers.replies import split_reply as split_reply
from cotgrpo.data.answers.thoughts import Thought as Thought
from cotgrpo.data.answers.thoughts import split_thought as split_thought
