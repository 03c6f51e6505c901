// Package image makes container images from static programs, without Docker and the same bytes every time.
package image

import (
	"archive/tar"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Spec is what an image is made of.
type Spec struct {
	// Name is the reference under which a runtime knows the image, for example local/app:1.
	Name string
	// Programs are put in with mode 0755; the first is the entry point unless Entrypoint is set.
	Programs   []Program
	Entrypoint []string
	// User is the numeric user the container runs as; empty means root.
	User string
	// Env holds KEY=VALUE.
	Env []string
	// Arch is a GOARCH; empty means this machine's.
	Arch string
}

// Program is a file to put into an image.
type Program struct {
	Source string
	Target string
}

// ParseProgram reads SOURCE[:TARGET]; the target defaults to the base name in the root directory.
func ParseProgram(s string) (Program, error) {
	source, target, ok := strings.Cut(s, ":")
	if !ok {
		target = "/" + path.Base(source)
	}
	if source == "" || !path.IsAbs(target) || path.Clean(target) == "/" {
		return Program{}, fmt.Errorf("%q is not SOURCE[:/TARGET]", s)
	}
	return Program{Source: source, Target: path.Clean(target)}, nil
}

// Write builds the image and writes it to a file as a Docker archive, which Docker, containerd and podman load.
func Write(spec Spec, file string) error {
	tag, err := name.NewTag(spec.Name)
	if err != nil {
		return fmt.Errorf("image name: %w", err)
	}
	img, err := build(spec)
	if err != nil {
		return fmt.Errorf("build image %s: %w", spec.Name, err)
	}
	// Renamed at the end, so that nobody loads half an image; two labs may write the same one at once.
	tmp, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return fmt.Errorf("write image %s: %w", spec.Name, err)
	}
	err = tarball.Write(tag, img, tmp)
	if err = errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write image %s: %w", spec.Name, err), os.Remove(tmp.Name()))
	}
	return nil
}

// Push sends the only image of an archive to a registry, with the credentials of the Docker configuration.
func Push(file, ref string, options ...remote.Option) error {
	to, err := name.ParseReference(ref)
	if err != nil {
		return fmt.Errorf("image name: %w", err)
	}
	img, err := tarball.ImageFromPath(file, nil)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	if err := remote.Write(to, img, options...); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}

func build(spec Spec) (v1.Image, error) {
	if len(spec.Programs) == 0 {
		return nil, errors.New("no program to put in")
	}
	layer, err := layer(spec.Programs)
	if err != nil {
		return nil, err
	}
	img, err := mutate.Append(empty.Image, mutate.Addendum{Layer: layer, History: v1.History{CreatedBy: "lab image build"}})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", cmp.Or(spec.Arch, runtime.GOARCH)
	config.Config = v1.Config{
		Entrypoint: spec.Entrypoint, User: spec.User, WorkingDir: "/",
		Env: append([]string{"PATH=/usr/local/bin:/usr/bin:/bin:/"}, spec.Env...),
	}
	if len(spec.Entrypoint) == 0 {
		config.Config.Entrypoint = []string{spec.Programs[0].Target}
	}
	return mutate.ConfigFile(img, config)
}

// layer makes the only layer: the programs and the few files that programs expect of a system.
func layer(programs []Program) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	entries := []entry{
		{name: "etc/", mode: 0o755},
		{name: "etc/passwd", mode: 0o644, content: text("root:x:0:0:root:/:\nnonroot:x:65532:65532:nonroot:/:\n")},
		{name: "etc/group", mode: 0o644, content: text("root:x:0:\nnonroot:x:65532:\n")},
		{name: "tmp/", mode: 0o1777},
	}
	for _, p := range programs {
		entries = append(entries, parents(p.Target)...)
		entries = append(entries, entry{name: strings.TrimPrefix(p.Target, "/"), mode: 0o755, content: func() ([]byte, error) {
			return os.ReadFile(p.Source)
		}})
	}
	slices.SortStableFunc(entries, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	entries = slices.CompactFunc(entries, func(a, b entry) bool { return a.name == b.name })
	for _, e := range entries {
		if err := e.write(w); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	})
}

// entry is a file of a layer, or a directory if the name ends in a slash.
type entry struct {
	name    string
	mode    int64
	content func() ([]byte, error)
}

func text(s string) func() ([]byte, error) {
	return func() ([]byte, error) { return []byte(s), nil }
}

// parents returns the directories above a path, outermost first.
func parents(target string) []entry {
	var dirs []entry
	for dir := path.Dir(strings.TrimPrefix(target, "/")); dir != "."; dir = path.Dir(dir) {
		dirs = append(dirs, entry{name: dir + "/", mode: 0o755})
	}
	slices.Reverse(dirs)
	return dirs
}

func (e entry) write(w *tar.Writer) error {
	header := &tar.Header{Name: e.name, Mode: e.mode, Typeflag: tar.TypeDir, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	var content []byte
	if e.content != nil {
		var err error
		if content, err = e.content(); err != nil {
			return err
		}
		header.Typeflag, header.Size = tar.TypeReg, int64(len(content))
	}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}
