package docstest

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/cli"
)

const root = "../.." // of the repository

// page is one page of the documentation.
type page struct {
	path, text string
	code       []string // inline code and lines of fenced blocks
}

var (
	fenceRE  = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")
	inlineRE = regexp.MustCompile("`([^`\n]+)`")
)

func pages(t *testing.T) []page {
	t.Helper()
	paths := []string{"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
	more, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range more {
		paths = append(paths, "docs/"+filepath.Base(p))
	}
	var out []page
	for _, path := range paths {
		p := page{path: path, text: read(t, path)}
		for _, m := range fenceRE.FindAllStringSubmatch(p.text, -1) {
			p.code = append(p.code, strings.Split(m[2], "\n")...)
		}
		for _, m := range inlineRE.FindAllStringSubmatch(fenceRE.ReplaceAllString(p.text, ""), -1) {
			p.code = append(p.code, m[1])
		}
		out = append(out, p)
	}
	return out
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	linkRE    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	headingRE = regexp.MustCompile(`(?m)^#+ (.*)$`)
	anchorRE  = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// TestLinks follows every link that stays in the repository, to its heading.
func TestLinks(t *testing.T) {
	for _, p := range pages(t) {
		for _, m := range linkRE.FindAllStringSubmatch(p.text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			target := filepath.Join(filepath.Dir(p.path), file)
			if file == "" {
				target = p.path
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil {
				t.Errorf("%s links to %s: %v", p.path, m[1], err)
			} else if anchor != "" && !slices.Contains(anchors(read(t, target)), anchor) {
				t.Errorf("%s links to %s, which has no such heading", p.path, m[1])
			}
		}
	}
}

// anchors are the headings as links name them.
func anchors(text string) []string {
	var out []string
	for _, m := range headingRE.FindAllStringSubmatch(text, -1) {
		out = append(out, strings.ReplaceAll(anchorRE.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return out
}

var (
	commandRE = regexp.MustCompile(`(?:^|[\s(])doppel((?: +[^\s|;#)]+)+)`)
	wordRE    = regexp.MustCompile(`^[a-z][a-z-]+$`)
	flagRE    = regexp.MustCompile(`^\[?(--?[a-z][a-z-]*)`)
)

// TestCommands looks for every command and flag that the pages name in the program's own help.
func TestCommands(t *testing.T) {
	top := help(t, nil)
	seen := map[string]string{}
	for _, p := range pages(t) {
		for _, c := range p.code {
			for _, m := range commandRE.FindAllStringSubmatch(c, -1) {
				words := strings.Fields(m[1])
				path := commandPath(top, words)
				if path == nil {
					t.Errorf("%s: no such command: %s", p.path, strings.TrimSpace(m[0]))
					continue
				}
				key := strings.Join(path, " ")
				if _, ok := seen[key]; !ok {
					seen[key] = help(t, path)
				}
				for _, w := range words[len(path):] {
					if w == "--" || w == "[--" {
						break // what comes then is the user's command
					}
					if f := flagRE.FindStringSubmatch(w); f != nil && !regexp.MustCompile(`(?m)^ +(-., )?`+regexp.QuoteMeta(f[1])+`[ ,]`).MatchString(seen[key]) {
						t.Errorf("%s: doppel %s has no flag %s", p.path, key, f[1])
					}
				}
			}
		}
	}
	if len(seen) < 8 {
		t.Errorf("only %d commands were found in the pages", len(seen))
	}
}

// commandPath is the part of the words that names a command, or nil if the first does not.
func commandPath(top string, words []string) []string {
	if !wordRE.MatchString(words[0]) || words[0] != "daemon" && !strings.Contains(top, "\n  "+words[0]+" ") {
		return nil
	}
	if (words[0] == "helm" || words[0] == "config" || words[0] == "rootd" || words[0] == "preview" || words[0] == "relay") && len(words) > 1 && wordRE.MatchString(words[1]) {
		if words[0] == "relay" && words[1] == "token" && len(words) > 2 {
			return words[:3]
		}
		return words[:2]
	}
	return words[:1]
}

// help is what the program prints for a command.
func help(t *testing.T, command []string) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout := os.Stdout
	os.Stdout = w
	out := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		out <- string(b)
	}()
	code := cli.Main(append(slices.Clone(command), "--help"))
	os.Stdout = stdout
	_ = w.Close()
	if code != 0 {
		t.Fatalf("doppel %v --help: exit code %d", command, code)
	}
	return <-out
}

var makeRE = regexp.MustCompile(`(?:^|[$\s])make ([a-z-]+)`)

// TestMakeTargets looks for every `make TARGET` in the Makefile.
func TestMakeTargets(t *testing.T) {
	makefile := "\n" + read(t, "Makefile")
	for _, p := range pages(t) {
		for _, c := range p.code {
			for _, m := range makeRE.FindAllStringSubmatch(c, -1) {
				if !strings.Contains(makefile, "\n"+m[1]+":") && !strings.HasPrefix(c, "sudo") {
					t.Errorf("%s: the Makefile has no target %s", p.path, m[1])
				}
			}
		}
	}
}

// TestShellBlocks runs the README's blocks marked sh as one script; those marked console are not run.
func TestShellBlocks(t *testing.T) {
	if os.Getenv("DOPPEL_E2E") != "1" {
		t.Skip("set DOPPEL_E2E=1 to run the README's shell blocks; they start a lab")
	}
	script := "set -euo pipefail\n"
	for _, m := range fenceRE.FindAllStringSubmatch(read(t, "README.md"), -1) {
		switch m[1] {
		case "sh":
			script += m[2]
		case "console", "":
		default:
			t.Errorf("a block is marked %q: want sh (is run) or console (is not)", m[1])
		}
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-c", script)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
