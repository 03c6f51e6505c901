// Command pages writes doppel's manual pages and shell completions, as packages bring them: pages DIR.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra/doc"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/cli"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: pages DIR")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "pages:", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	man := filepath.Join(dir, "man")
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	c := cli.Command()
	c.DisableAutoGenTag = true // the same input gives the same bytes; the date is SOURCE_DATE_EPOCH's
	c.InitDefaultCompletionCmd()
	return errors.Join(
		doc.GenManTree(c, &doc.GenManHeader{Title: "DOPPEL", Section: "1", Source: "doppel " + buildinfo.Version, Manual: "doppel"}, man),
		c.GenBashCompletionFileV2(filepath.Join(dir, "doppel.bash"), true),
		c.GenZshCompletionFile(filepath.Join(dir, "_doppel")),
		c.GenFishCompletionFile(filepath.Join(dir, "doppel.fish"), true),
	)
}
