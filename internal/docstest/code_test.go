package docstest

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/doppel-dev/doppel/internal/config"
)

// sources parses the Go files, tests aside, below directories of the repository.
func sources(t *testing.T, dirs ...string) []*ast.File {
	t.Helper()
	var files []*ast.File
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
			files = append(files, f)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// rows are the cells of each row of the tables in a text.
func rows(text string) [][]string {
	var out [][]string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|-") {
			continue
		}
		var cells []string
		for _, c := range strings.Split(strings.Trim(line, "|"), " | ") {
			cells = append(cells, strings.TrimSpace(c))
		}
		out = append(out, cells)
	}
	return out
}

var logMethods = []string{"Debug", "Info", "Warn", "Error", "With"}

// TestLogKeys compares docs/logging.md with the keys that are logged.
func TestLogKeys(t *testing.T) {
	used := map[string]bool{}
	for _, f := range sources(t, "internal", "cmd") {
		if strings.HasSuffix(f.Name.Name, "test") {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if sel, ok := call.Fun.(*ast.SelectorExpr); ok && slices.Contains(logMethods, sel.Sel.Name) && isLog(sel.X) {
				first := 1
				if sel.Sel.Name == "With" {
					first = 0
				}
				for i := first; i+1 < len(call.Args); i += 2 {
					if lit, ok := call.Args[i].(*ast.BasicLit); ok && lit.Kind == token.STRING {
						used[strings.Trim(lit.Value, `"`)] = true
					}
				}
			}
			return true
		})
	}
	if len(used) < 10 {
		t.Fatalf("only %d keys were found in the code", len(used))
	}
	described := map[string]bool{}
	for _, r := range rows(read(t, "docs/logging.md")) {
		if m := inlineRE.FindStringSubmatch(r[0]); m != nil {
			described[m[1]] = true
		}
	}
	for _, k := range slices.Sorted(maps.Keys(used)) {
		if !described[k] {
			t.Errorf("docs/logging.md lacks the key %s", k)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(described)) {
		if !used[k] {
			t.Errorf("docs/logging.md has the key %s, which nobody logs", k)
		}
	}
}

// isLog says whether an expression is a logger, by its name: x.log, x.cfg.Log, log, or slog.New(…).
func isLog(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return strings.EqualFold(x.Name, "log")
	case *ast.SelectorExpr:
		return strings.EqualFold(x.Sel.Name, "log")
	case *ast.CallExpr:
		sel, ok := x.Fun.(*ast.SelectorExpr)
		return ok && sel.Sel.Name == "New" && isIdent(sel.X, "slog")
	}
	return false
}

func isIdent(x ast.Expr, name string) bool {
	id, ok := x.(*ast.Ident)
	return ok && id.Name == name
}

// TestLimits compares the time-outs and limits in docs/architecture.md with the code.
func TestLimits(t *testing.T) {
	_, section, ok := strings.Cut(read(t, "docs/architecture.md"), "\n## 7. ")
	if !ok {
		t.Fatal("docs/architecture.md has no section 7")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	n := 0
	for _, r := range rows(section)[1:] {
		names := inlineRE.FindAllStringSubmatch(r[0], -1)
		values := strings.Split(r[1], ", ")
		if len(names) != len(values) {
			t.Errorf("%v: %d names, %d values", r, len(names), len(values))
			continue
		}
		for i, name := range names {
			n++
			if err := checkLimit(t, name[1], values[i]); err != nil {
				t.Errorf("docs/architecture.md says %s is %s: %v", name[1], values[i], err)
			}
		}
	}
	if n < 20 {
		t.Errorf("only %d limits were found", n)
	}
}

func checkLimit(t *testing.T, name, want string) error {
	t.Helper()
	parts := strings.Split(name, ".")
	if parts[0] == "session" {
		got, err := chartValue(t, name)
		if err != nil {
			return err
		}
		d, err := time.ParseDuration(fmt.Sprint(got))
		if err != nil || d != quantity(want) {
			return fmt.Errorf("the chart says %v", got)
		}
		return nil
	}
	files := sources(t, "internal/"+parts[0])
	if len(parts) == 3 {
		return checkField(files, parts[1], parts[2], want)
	}
	got, ok := constant(files, parts[1])
	if !ok {
		return fmt.Errorf("no such constant")
	}
	if got != quantity(want) {
		return fmt.Errorf("the code says %v", got)
	}
	return nil
}

// checkField looks for the value in the comment of a struct's field, or of the fields above it that share one.
func checkField(files []*ast.File, typ, field, want string) error {
	for _, f := range files {
		comment, found := "", ""
		ast.Inspect(f, func(n ast.Node) bool {
			ts, ok := n.(*ast.TypeSpec)
			if !ok || ts.Name.Name != typ {
				return true
			}
			st, ok := ts.Type.(*ast.StructType)
			if !ok {
				return true
			}
			for _, fl := range st.Fields.List {
				comment = fl.Doc.Text() + fl.Comment.Text()
				for _, id := range fl.Names {
					if id.Name == field {
						found = comment
					}
				}
			}
			return false
		})
		if found == "" {
			continue
		}
		if !strings.Contains(found, want) {
			return fmt.Errorf("its comment says %q", found)
		}
		return nil
	}
	return fmt.Errorf("no such field")
}

// constant evaluates a constant of numbers and time units, in nanoseconds if it is a time.
func constant(files []*ast.File, name string) (time.Duration, bool) {
	for _, f := range files {
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				for i, id := range v.Names {
					if id.Name == name && i < len(v.Values) {
						return evaluate(v.Values[i])
					}
				}
			}
		}
	}
	return 0, false
}

var units = map[string]time.Duration{"Millisecond": time.Millisecond, "Second": time.Second, "Minute": time.Minute, "Hour": time.Hour}

func evaluate(x ast.Expr) (time.Duration, bool) {
	switch x := x.(type) {
	case *ast.BasicLit:
		n, err := strconv.ParseInt(strings.ReplaceAll(x.Value, "_", ""), 0, 64)
		return time.Duration(n), err == nil
	case *ast.SelectorExpr:
		u, ok := units[x.Sel.Name]
		return u, ok && isIdent(x.X, "time")
	case *ast.BinaryExpr:
		a, aok := evaluate(x.X)
		b, bok := evaluate(x.Y)
		if x.Op == token.MUL {
			return a * b, aok && bok
		}
		return a << b, aok && bok && x.Op == token.SHL
	}
	return 0, false
}

// quantity reads "2.8 s", "10 min" or "4,096"; -1 is none of these.
func quantity(s string) time.Duration {
	number, unit, _ := strings.Cut(s, " ")
	f, err := strconv.ParseFloat(strings.ReplaceAll(number, ",", ""), 64)
	u, ok := map[string]time.Duration{"": 1, "ms": time.Millisecond, "s": time.Second, "min": time.Minute, "h": time.Hour, "d": 24 * time.Hour}[unit]
	if err != nil || !ok {
		return -1
	}
	return time.Duration(f * float64(u))
}

// chartValue looks a dotted key up in the chart's values.
func chartValue(t *testing.T, key string) (any, error) {
	t.Helper()
	var v any
	if err := yaml.Unmarshal([]byte(read(t, "charts/doppel/values.yaml")), &v); err != nil {
		t.Fatal(err)
	}
	for _, k := range strings.Split(key, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("the chart has no value %s", key)
		}
		if v, ok = m[k]; !ok {
			return nil, fmt.Errorf("the chart has no value %s", key)
		}
	}
	return v, nil
}

var setRE = regexp.MustCompile(`(?:--set '?|^)((?:image|manager|agent|session|reach|admission|clientRbac|networkPolicy|direct)(?:\.[a-zA-Z]+)+)(?:$|[=\[ ])`)

// TestValues looks for every value of the chart that the pages name.
func TestValues(t *testing.T) {
	for _, p := range pages(t) {
		for _, c := range p.code {
			if attackRE.MatchString(c) {
				continue // package.TestName
			}
			for _, m := range setRE.FindAllStringSubmatch(c, -1) {
				_, err := chartValue(t, m[1])
				if err == nil {
					continue
				}
				pkg, name, _ := strings.Cut(m[1], ".") // or a constant of a package of that name
				if _, serr := os.Stat(filepath.Join(root, "internal", pkg)); serr == nil {
					if _, ok := constant(sources(t, "internal/"+pkg), name); ok {
						continue
					}
				}
				t.Errorf("%s: %v", p.path, err)
			}
		}
	}
}

var (
	ruleRE = regexp.MustCompile(`(?m)^ *- apiGroups: .*\n *resources: \[(.*)\]\n(?: *resourceNames: \[(.*)\]\n)? *verbs: \[(.*)\]`)
	listRE = regexp.MustCompile(`[a-z/-]+`)
)

// TestRights looks for a row of docs/security.md for each rule of the chart's roles, with all its resources, names and verbs.
func TestRights(t *testing.T) {
	described := rows(read(t, "docs/security.md"))
	n := 0
	for _, file := range []string{"rbac.yaml", "rbac-clients.yaml"} {
		for _, m := range ruleRE.FindAllStringSubmatch(read(t, "charts/doppel/templates/"+file), -1) {
			n++
			var want []string
			for _, r := range listRE.FindAllString(m[1], -1) {
				want = append(want, "`"+r+"`")
			}
			if name := strings.Trim(strings.ReplaceAll(m[2], "{{ .Release.Namespace }}", "NAMESPACE"), `"`); name != "" {
				want = append(want, "`"+name+"`")
			}
			want = append(want, listRE.FindAllString(m[3], -1)...)
			if !slices.ContainsFunc(described, func(row []string) bool {
				return slices.ContainsFunc(row, func(c string) bool { return hasAll(c, want) })
			}) {
				t.Errorf("docs/security.md has no row for the rule in %s with %v", file, want)
			}
		}
	}
	if n < 15 {
		t.Errorf("only %d rules were found", n)
	}
}

// hasAll says whether a cell is a rule of exactly these: "`a`, `b`: get, list".
func hasAll(cell string, want []string) bool {
	for _, w := range want {
		if !slices.Contains(strings.FieldsFunc(cell, func(r rune) bool { return r == ' ' || r == ',' || r == ';' }), w) &&
			!strings.Contains(cell, w+":") {
			return false
		}
	}
	_, verbs, _ := strings.Cut(cell, ": ")
	n := 0
	for _, w := range want {
		if !strings.HasPrefix(w, "`") {
			n++
		}
	}
	return len(listRE.FindAllString(verbs, -1)) == n
}

// TestConfigKeys compares docs/configuration.md with the keys that the configuration file may have.
func TestConfigKeys(t *testing.T) {
	text, _, _ := strings.Cut(read(t, "docs/configuration.md"), "\n## ")
	var described []string
	for _, r := range rows(text)[1:] {
		if m := inlineRE.FindStringSubmatch(r[0]); m != nil {
			described = append(described, m[1])
		}
	}
	for _, k := range config.Keys() {
		if !slices.Contains(described, k) {
			t.Errorf("docs/configuration.md lacks the key %s", k)
		}
	}
	for _, k := range described {
		if !slices.Contains(config.Keys(), k) {
			t.Errorf("docs/configuration.md has the key %s, which the file may not have", k)
		}
	}
	for _, m := range fenceRE.FindAllStringSubmatch(read(t, "docs/configuration.md"), -1) {
		if _, err := config.Parse([]byte(m[2])); m[1] == "yaml" && err != nil {
			t.Errorf("docs/configuration.md: an example is refused: %v", err)
		}
	}
}

var (
	attackRE = regexp.MustCompile(`^([a-z0-9/]+\.)?((?:Test|Fuzz)[A-Za-z0-9]+)(?:/(.+))?$`)
	funcRE   = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9]+)\(`)
)

// TestAttacks looks for each test that a table of attacks in docs/security.md names: TestName, package.TestName, and either with /the name of a part.
func TestAttacks(t *testing.T) {
	tests := map[string]map[string]string{} // the text of the file by name and directory
	for _, dir := range []string{"internal", "e2e"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(file string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(file, "_test.go") {
				return err
			}
			b, err := os.ReadFile(file)
			for _, m := range funcRE.FindAllStringSubmatch(string(b), -1) {
				if tests[m[1]] == nil {
					tests[m[1]] = map[string]string{}
				}
				tests[m[1]][filepath.ToSlash(filepath.Dir(file))] = string(b)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	n, table := 0, false
	for _, r := range rows(read(t, "docs/security.md")) {
		switch {
		case len(r) == 3 && r[2] == "test":
			table = true
		case len(r) != 3 || r[2] == "":
			table = false
		case table:
			names := inlineRE.FindAllStringSubmatch(r[2], -1)
			if len(names) == 0 {
				t.Errorf("no test for: %s", r[0])
			}
			for _, name := range names {
				n++
				if err := findTest(tests, name[1]); err != nil {
					t.Errorf("docs/security.md names %s: %v", name[1], err)
				}
			}
		}
	}
	if n < 100 {
		t.Errorf("only %d tests were found in the tables", n)
	}
}

func findTest(tests map[string]map[string]string, name string) error {
	m := attackRE.FindStringSubmatch(name)
	if m == nil {
		return errors.New("which is no name of a test")
	}
	var in []string
	for dir, text := range tests[m[2]] {
		if m[1] != "" && !strings.HasSuffix(dir, "/"+strings.TrimSuffix(m[1], ".")) {
			continue
		}
		if m[3] != "" && !strings.Contains(text, strconv.Quote(m[3])) {
			return fmt.Errorf("%s has no such part", dir)
		}
		in = append(in, dir)
	}
	switch {
	case len(in) == 0:
		return errors.New("there is none")
	case len(in) > 1 && m[1] == "":
		return fmt.Errorf("there are several: %v", in)
	}
	return nil
}

// TestFuzzCorpora: what is fuzzed begins with inputs that are kept, in testdata/fuzz of its package; and none are kept for what is gone.
func TestFuzzCorpora(t *testing.T) {
	targets, corpora := map[string]bool{}, map[string]bool{} // by the directory of the inputs
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root:
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if err == nil || path == filepath.Join(root, "bin") || strings.HasPrefix(d.Name(), ".") { // another module, or none of ours
				return filepath.SkipDir
			}
		case strings.HasSuffix(path, "_test.go"):
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, m := range funcRE.FindAllStringSubmatch(string(b), -1) {
				if strings.HasPrefix(m[1], "Fuzz") {
					targets[filepath.Join(filepath.Dir(path), "testdata", "fuzz", m[1])] = true
				}
			}
		case filepath.Base(filepath.Dir(filepath.Dir(path))) == "fuzz":
			corpora[filepath.Dir(path)] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range slices.Sorted(maps.Keys(targets)) {
		if !corpora[dir] {
			t.Errorf("no input is kept in %s", dir)
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(corpora)) {
		if !targets[dir] {
			t.Errorf("%s is of no fuzz test", dir)
		}
	}
	if len(targets) < 40 {
		t.Errorf("only %d fuzz tests were found", len(targets))
	}
}

var imageRE = regexp.MustCompile(`(?m)^\tbin/lab image build (.*)$`)

// TestImages: each image is one program, which no root runs: there is no shell, and nothing else to run, in it.
func TestImages(t *testing.T) {
	all := imageRE.FindAllStringSubmatch(read(t, "Makefile"), -1)
	if len(all) < 4 {
		t.Errorf("only %d images were found in the Makefile", len(all))
	}
	for _, m := range all {
		if strings.Count(m[1], "--binary ") != 1 || !strings.Contains(m[1], "--user 65532 ") || strings.Contains(m[1], "--base") {
			t.Errorf("%s", m[0])
		}
	}
}
