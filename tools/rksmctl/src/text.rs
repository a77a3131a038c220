// SPDX-License-Identifier: GPL-2.0-only
//! Text in the width of the terminal.

use textwrap::{fill, Options, WordSplitter};

fn options(width: usize) -> Options<'static> {
    Options::new(width)
        .break_words(false)
        .word_splitter(WordSplitter::NoHyphenation)
        .wrap_algorithm(textwrap::WrapAlgorithm::FirstFit)
}

/// Breaks a line at spaces so that none is wider than `width`, where a word is not wider itself.
/// Lines after the first begin with `indent` spaces, or fewer on a narrow terminal.
pub fn wrap(line: &str, width: usize, indent: usize) -> String {
    let indent = " ".repeat(indent.min(width / 4));
    fill(line, options(width).subsequent_indent(&indent))
}

/// "LABEL     text text", wrapped between words to `width` columns. The lines that follow begin
/// where the text does; on a narrow terminal two columns in, so that something fits there.
pub fn labelled(width: usize, label: &str, column: usize, text: &str) -> String {
    let narrow = width < column + 30;
    let indent = " ".repeat(if narrow { column.min(2) } else { column });
    if narrow && !label.is_empty() {
        // Also between the label and the text, if they do not fit together.
        let line = format!("{label} {text}");
        return fill(line.trim_end(), options(width).subsequent_indent(&indent)) + "\n";
    }
    let first = match narrow {
        true => indent.clone(),
        false => format!("{label:<column$}"),
    };
    let options = options(width)
        .initial_indent(&first)
        .subsequent_indent(&indent);
    match text {
        "" => first.trim_end().to_string() + "\n",
        _ => fill(text, options) + "\n",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped() {
        assert_eq!(wrap("one two three", 80, 2), "one two three");
        assert_eq!(wrap("  one  two three", 12, 3), "  one  two\n   three");
        assert_eq!(wrap("one two three", 7, 1), "one two\n three");
        assert_eq!(
            wrap("incomprehensibilities all", 5, 1),
            "incomprehensibilities\n all"
        );
        assert_eq!(wrap("", 5, 1), "");
    }

    #[test]
    fn wraps_between_words() {
        let text = "some words that do not fit into one line of this terminal";
        assert_eq!(
            labelled(45, "label", 10, text),
            "label     some words that do not fit into one\n          line of this terminal\n"
        );
        assert_eq!(
            labelled(20, "label", 10, "words that do not fit"),
            "label words that do\n  not fit\n"
        );
        assert_eq!(labelled(80, "empty", 10, ""), "empty\n");
        assert_eq!(labelled(20, "empty", 10, ""), "empty\n");
        assert_eq!(
            labelled(20, "a_label_of_17_wide:", 22, "10 -> 50"),
            "a_label_of_17_wide:\n  10 -> 50\n"
        );
    }
}
