package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/doc"
	"go/parser"
	"go/scanner"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// pkg is what is asked of `go list -json`, and the same of a made-up package in the tests of the rules.
type pkg struct {
	ImportPath string
	Name       string
	Dir        string
	Imports    []string
}

// path is the package's path inside the module, or the import path of a foreign one.
func (p pkg) path() string { return strings.TrimPrefix(p.ImportPath, module) }

func (p pkg) ours() bool { return strings.HasPrefix(p.ImportPath, module) }

func TestLayers(t *testing.T)    { check(t, layerViolations(load(t).all())) }
func TestImporters(t *testing.T) { check(t, importerViolations(load(t).ours)) }
func TestLinks(t *testing.T)     { check(t, linkViolations(load(t).all())) }
func TestDocs(t *testing.T)      { check(t, fileViolations(t, load(t).ours, docViolations)) }
func TestMains(t *testing.T)     { check(t, fileViolations(t, load(t).ours, mainViolations)) }
func TestGOOS(t *testing.T)      { check(t, fileViolations(t, load(t).ours, goosViolations)) }

func check(t *testing.T, violations []string) {
	t.Helper()
	for _, v := range violations {
		t.Error(v)
	}
}

// graph is the module as the go command sees it, the imports of all platforms together.
type graph struct {
	root    string
	ours    []pkg
	foreign []pkg
}

func (g *graph) all() []pkg { return slices.Concat(g.ours, g.foreign) }

var loaded *graph

// load asks the go command once for all tests.
func load(t *testing.T) *graph {
	t.Helper()
	if loaded != nil {
		return loaded
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	tracked := trackedDirs(root)
	byPath := make(map[string]pkg)
	for _, platform := range platforms {
		cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Name,Dir,Imports", "./...")
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "GOOS="+platform, "CGO_ENABLED=0")
		out, err := cmd.Output()
		if err != nil {
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				err = fmt.Errorf("%w: %s", err, exit.Stderr)
			}
			t.Fatalf("go list for %s: %v", platform, err)
		}
		for dec := json.NewDecoder(bytes.NewReader(out)); ; {
			var p pkg
			if err := dec.Decode(&p); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			p.Imports = slices.Concat(p.Imports, byPath[p.ImportPath].Imports)
			slices.Sort(p.Imports)
			p.Imports = slices.Compact(p.Imports)
			byPath[p.ImportPath] = p
		}
	}
	loaded = &graph{root: root}
	for _, name := range slices.Sorted(maps.Keys(byPath)) {
		switch p := byPath[name]; {
		case !p.ours():
			loaded.foreign = append(loaded.foreign, p)
		case tracked == nil || tracked[p.path()]:
			loaded.ours = append(loaded.ours, p)
		}
	}
	if len(loaded.ours) == 0 {
		t.Fatal("no packages found")
	}
	return loaded
}

// trackedDirs are the directories with Go files that git knows: what lies about in somebody's checkout is nobody's business. Nil
// where there is no git.
func trackedDirs(root string) map[string]bool {
	cmd := exec.Command("git", "ls-files", "--", "*.go")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil || len(out) == 0 {
		return nil
	}
	dirs := make(map[string]bool)
	for file := range strings.Lines(string(out)) {
		dirs[path.Dir(strings.TrimSpace(file))] = true
	}
	return dirs
}

// forTests tells packages that only tests use.
func forTests(p string) bool {
	return strings.HasSuffix(p, "test") || strings.HasPrefix(p, "e2e")
}

func hasPrefix(s string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return covers(p, s) })
}

// covers tells whether an import path is a prefix's: "k8s.io/" covers all below, "flag" itself and what is below it.
func covers(prefix, importPath string) bool {
	rest, ok := strings.CutPrefix(importPath, prefix)
	return ok && (rest == "" || strings.HasSuffix(prefix, "/") || rest[0] == '/')
}

// layerViolations names imports that go up or sideways, and what a layer must not import or link.
func layerViolations(pkgs []pkg) []string {
	level := make(map[string]int)
	for i, l := range layers {
		for _, p := range l.packages {
			level[p] = i
		}
	}
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, p := range pkgs {
		name := p.path()
		if !p.ours() || forTests(name) {
			continue
		}
		from, known := level[name]
		free := hasPrefix(name, outside)
		if !known && !free {
			say("%s is in no layer: add it to layers in rules_test.go", name)
			continue
		}
		for _, imported := range p.Imports {
			to, ours := strings.CutPrefix(imported, module)
			switch {
			case !ours:
				if !free && layers[from].only != nil && strings.Contains(strings.Split(imported, "/")[0], ".") && !hasPrefix(imported, layers[from].only) {
					say("%s (%s) imports %s; that layer imports only %v", name, layers[from].name, imported, layers[from].only)
				}
			case forTests(to):
				say("%s imports %s, which is for tests", name, to)
			case free:
				if !hasPrefix(to, outside) {
					say("%s imports %s, but stands outside", name, to)
				}
			case level[to] > from:
				say("%s (%s) imports %s (%s): imports go down only", name, layers[from].name, to, layers[level[to]].name)
			case level[to] == from && !slices.Contains(sideways[name], to):
				say("%s imports %s of its own layer (%s), an edge that is not in sideways", name, to, layers[from].name)
			}
		}
		if free {
			continue
		}
		for prefix := range layers[from].never {
			if chain := pathTo(pkgs, p.ImportPath, prefix); chain != nil {
				say("%s (%s) must not link %s: %s", name, layers[from].name, prefix, strings.Join(chain, " → "))
			}
		}
	}
	slices.Sort(out)
	return out
}

// importerViolations names direct imports of a library that has its rooms elsewhere.
func importerViolations(pkgs []pkg) []string {
	var out []string
	for _, p := range pkgs {
		for _, rule := range importers {
			if forTests(p.path()) || slices.Contains(rule.packages, p.path()) {
				continue
			}
			for _, imported := range p.Imports {
				if covers(rule.library, imported) {
					out = append(out, fmt.Sprintf("%s imports %s; only %v do: %s", p.path(), imported, rule.packages, rule.reason))
				}
			}
		}
	}
	return out
}

// linkViolations names dependencies that a binary must not have, with the way they come in.
func linkViolations(pkgs []pkg) []string {
	var out []string
	for _, p := range pkgs {
		name := p.path()
		if !p.ours() || !strings.HasPrefix(name, "cmd/") {
			continue
		}
		rules, ok := links[name]
		if !ok {
			out = append(out, fmt.Sprintf("%s has no entry in links", name))
		}
		for _, prefix := range slices.Sorted(maps.Keys(rules)) {
			if chain := pathTo(without(pkgs, linkedBy[name][prefix]), p.ImportPath, prefix); chain != nil {
				out = append(out, fmt.Sprintf("%s must not link %s (%s): %s", name, prefix, rules[prefix], strings.Join(chain, " → ")))
			}
		}
	}
	return out
}

// without returns the packages as if those of a list imported nothing.
func without(pkgs []pkg, list map[string]string) []pkg {
	if len(list) == 0 {
		return pkgs
	}
	out := slices.Clone(pkgs)
	for i := range out {
		if _, ok := list[out[i].ImportPath]; ok {
			out[i].Imports = nil
		}
	}
	return out
}

// pathTo returns the shortest chain of imports from a package to one that prefix covers.
func pathTo(pkgs []pkg, from, prefix string) []string {
	imports := make(map[string][]string, len(pkgs))
	for _, p := range pkgs {
		imports[p.ImportPath] = p.Imports
	}
	before := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		if queue[0] != from && covers(prefix, queue[0]) {
			var chain []string
			for p := queue[0]; p != ""; p = before[p] {
				chain = append(chain, strings.TrimPrefix(p, module))
			}
			slices.Reverse(chain)
			return chain
		}
		for _, next := range imports[queue[0]] {
			if _, seen := before[next]; !seen {
				before[next] = queue[0]
				queue = append(queue, next)
			}
		}
	}
	return nil
}

// source is one Go file, tests aside.
type source struct {
	path string // inside the module
	text []byte
	ast  *ast.File
	fset *token.FileSet
}

func parse(t *testing.T, name string, text []byte) source {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, text, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	return source{path: name, text: text, ast: f, fset: fset}
}

func fileViolations(t *testing.T, pkgs []pkg, rule func(p pkg, files []source) []string) []string {
	t.Helper()
	var out []string
	for _, p := range pkgs {
		names, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		var files []source
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, parse(t, path.Join(p.path(), filepath.Base(name)), text))
		}
		out = append(out, rule(p, files)...)
	}
	return out
}

// docViolations wants each package to say in one sentence what it owns. Further paragraphs are welcome.
func docViolations(p pkg, files []source) []string {
	if len(files) == 0 {
		return nil // a package of tests only
	}
	want := "Package " + p.Name + " "
	switch name := p.path(); {
	case p.Name == "main":
		want = "Command " + path.Base(name) + " "
	case strings.HasPrefix(name, "internal/"), strings.HasPrefix(name, "api/"):
		want += "owns "
	}
	var docs []string
	for _, f := range files {
		if f.ast.Doc != nil {
			docs = append(docs, f.ast.Doc.Text())
		}
	}
	if len(docs) != 1 {
		return []string{fmt.Sprintf("%s: %d files have a package comment, want one that starts with %q", p.path(), len(docs), want)}
	}
	first, _, _ := strings.Cut(docs[0], "\n\n")
	first = strings.Join(strings.Fields(first), " ")
	if !strings.HasPrefix(first, want) || !strings.HasSuffix(first, ".") || new(doc.Package).Synopsis(docs[0]) != first {
		return []string{fmt.Sprintf("%s: the package comment's first paragraph is to be one sentence that starts with %q, is %q", p.path(), want, first)}
	}
	return nil
}

// mainViolations bounds the code of main packages under cmd.
func mainViolations(p pkg, files []source) []string {
	if !strings.HasPrefix(p.path(), "cmd/") {
		return nil
	}
	n := 0
	for _, f := range files {
		n += codeLines(f.text)
	}
	if n > maxMain {
		return []string{fmt.Sprintf("%s has %d lines of code, at most %d are allowed: mains compose", p.path(), n, maxMain)}
	}
	return nil
}

func codeLines(text []byte) int {
	fset := token.NewFileSet()
	file := fset.AddFile("", fset.Base(), len(text))
	var s scanner.Scanner
	s.Init(file, text, nil, 0)
	lines := make(map[int]bool)
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return len(lines)
		}
		if tok == token.SEMICOLON && lit == "\n" {
			continue
		}
		first := file.Line(pos)
		for i := range 1 + strings.Count(lit, "\n") {
			lines[first+i] = true
		}
	}
}

// goosViolations finds runtime.GOOS outside mains.
func goosViolations(p pkg, files []source) []string {
	var out []string
	for _, f := range files {
		if goos[f.path] != "" || p.Name == "main" || forTests(p.path()) {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || sel.Sel.Name != "GOOS" {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == "runtime" {
				out = append(out, fmt.Sprintf("%s:%d asks runtime.GOOS: use a file per platform, or take goos as a parameter",
					f.path, f.fset.Position(n.Pos()).Line))
			}
			return true
		})
	}
	return out
}
