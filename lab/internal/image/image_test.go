package image

import (
	"bytes"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// program writes a file that stands for a program, with a time of its own.
func program(t *testing.T, age time.Duration) string {
	path := filepath.Join(t.TempDir(), "app")
	if err := os.WriteFile(path, []byte("#!/bin/true\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	when := time.Now().Add(-age)
	if err := os.Chtimes(path, when, when); err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, spec Spec) string {
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := Write(spec, file); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestWriteIsDeterministic(t *testing.T) {
	var archives [][]byte
	for _, age := range []time.Duration{0, time.Hour} {
		file := write(t, Spec{Name: "local/app:1", Programs: []Program{{program(t, age), "/opt/bin/app"}, {program(t, age), "/two"}}})
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, b)
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the same programs gave different archives")
	}
}

// Two labs that start for the first time side by side write the same file.
func TestWriteAtOnce(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "app")
	if err := os.WriteFile(big, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	file := filepath.Join(out, "image.tar")
	spec := Spec{Name: "local/app:1", Programs: []Program{{big, "/app"}}}
	errs := make(chan error)
	for range 8 {
		go func() { errs <- Write(spec, file) }()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o644 {
		t.Errorf("%v, %v", info, err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(write(t, spec))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("not what one alone writes")
	}
	if left, _ := os.ReadDir(out); len(left) != 1 {
		t.Errorf("files are left: %v", left)
	}
}

func TestWriteConfig(t *testing.T) {
	file := write(t, Spec{Name: "local/app:1", User: "65532", Arch: "arm64", Env: []string{"A=b"}, Programs: []Program{{program(t, 0), "/app"}}})
	tag, err := name.NewTag("local/app:1")
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(file, &tag)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(config.Config.Entrypoint, []string{"/app"}) || config.Config.User != "65532" || config.Architecture != "arm64" {
		t.Errorf("config %+v", config)
	}
	if !slices.Contains(config.Config.Env, "A=b") {
		t.Errorf("environment %v", config.Config.Env)
	}
}

func TestPush(t *testing.T) {
	server := httptest.NewServer(registry.New())
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/team/app:2"
	if err := Push(write(t, Spec{Name: "local/app:1", Programs: []Program{{program(t, 0), "/app"}}}), ref); err != nil {
		t.Fatal(err)
	}
	parsed, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Head(parsed); err != nil {
		t.Errorf("the image is not there: %v", err)
	}
}

func TestWriteRefuses(t *testing.T) {
	dir := t.TempDir()
	for what, spec := range map[string]Spec{
		"no program":      {Name: "local/app:1"},
		"missing program": {Name: "local/app:1", Programs: []Program{{filepath.Join(dir, "none"), "/app"}}},
		"bad name":        {Name: "UPPER", Programs: []Program{{program(t, 0), "/app"}}},
	} {
		if Write(spec, filepath.Join(dir, "x.tar")) == nil {
			t.Errorf("%s is accepted", what)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("files are left after an error: %v", left)
	}
}

func TestParseProgram(t *testing.T) {
	for s, want := range map[string]Program{
		"bin/app":            {"bin/app", "/app"},
		"bin/app:/usr/bin/x": {"bin/app", "/usr/bin/x"},
	} {
		if got, err := ParseProgram(s); err != nil || got != want {
			t.Errorf("%s: %v %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", ":/x", "bin/app:x", "bin/app:/"} {
		if got, err := ParseProgram(s); err == nil {
			t.Errorf("%q is accepted as %v", s, got)
		}
	}
}
