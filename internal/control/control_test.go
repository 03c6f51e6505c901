package control

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// messages are new values of all there are, by the name of a file in testdata/version1.
var messages = map[string]func() any{
	"table": func() any { return &Table{} }, "canary": func() any { return &Canary{} }, "note": func() any { return &Note{} },
	"ask-environment": func() any { return &AskEnvironment{} }, "environment": func() any { return &Environment{} },
	"ask-cluster": func() any { return &AskCluster{} }, "cluster": func() any { return &Cluster{} }, "cluster-changes": func() any { return &Cluster{} }, "intercepts": func() any { return &Intercepts{} },
	"ask-why": func() any { return &AskWhy{} }, "why": func() any { return &Why{} },
}

// TestVersion1 reads what programs of version 1 of the protocol have said and goes on to be said. The files are never rewritten: a field that is renamed,
// or gets another type, has laptops, managers and agents of two releases misunderstand each other. New fields get a line of their own in them.
func TestVersion1(t *testing.T) {
	files, err := filepath.Glob("testdata/version1/*.json")
	if err != nil || len(files) != len(messages) {
		t.Fatalf("%d files for %d messages, %v", len(files), len(messages), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			then := messages[name]()
			strict := json.NewDecoder(bytes.NewReader(text))
			strict.DisallowUnknownFields()
			if err := strict.Decode(then); err != nil {
				t.Fatal(err)
			}
			again, err := json.Marshal(then)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(generic(t, text), generic(t, again)); diff != "" {
				t.Errorf("read, and said again: %s", diff)
			}
			// What a later version adds is passed over.
			later, err := json.Marshal(extended(generic(t, text)))
			if err != nil {
				t.Fatal(err)
			}
			now := messages[name]()
			if err := json.Unmarshal(later, now); err != nil {
				t.Fatal(err)
			}
			if got, err := json.Marshal(now); err != nil || !bytes.Equal(got, again) {
				t.Errorf("with fields of a later version it is %s, not %s (%v)", got, again, err)
			}
		})
	}
}

func generic(t *testing.T, text []byte) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// extended adds a field to each object. A rule is not to be had with one more: see match.Rule.
func extended(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = extended(v[i])
		}
	case map[string]any:
		for key := range v {
			if key != "match" && key != "variables" && key != "services" { // the last two have names of the user's
				v[key] = extended(v[key])
			}
		}
		v["later"] = map[string]any{"more": 1}
	}
	return v
}
