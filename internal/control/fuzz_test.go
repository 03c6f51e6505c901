package control

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/match"
)

// FuzzMessages: whatever another program says, what was understood of it is said again as the same, and its rules can be tried.
func FuzzMessages(f *testing.F) {
	files, err := filepath.Glob("testdata/version1/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		var small bytes.Buffer
		if err := json.Compact(&small, text); err != nil {
			f.Fatal(err)
		}
		f.Add(strings.TrimSuffix(filepath.Base(file), ".json"), small.Bytes())
	}
	f.Fuzz(func(t *testing.T, name string, text []byte) {
		if messages[name] == nil {
			return
		}
		m, again := messages[name](), messages[name]()
		if json.Unmarshal(text, m) != nil {
			return
		}
		said, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(said, again); err != nil {
			t.Fatalf("%s: own form %s is not understood: %v", name, said, err)
		}
		if twice, err := json.Marshal(again); err != nil || !bytes.Equal(twice, said) {
			t.Errorf("%s: %s became %s, %v", name, said, twice, err)
		}
		if table, ok := m.(*Table); ok {
			for _, i := range table.Items {
				if rule, err := match.Compile(i.Match); err == nil {
					_ = rule.Match(&Request{Verb: "GET", Target: "/"})
				}
			}
		}
	})
}
