package tundev_test

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestDevice(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	f, name, err := tundev.Open("doppel%d", 0, 4711)
	if err != nil {
		t.Fatal(err)
	}
	if name != "doppel0" {
		t.Errorf("name %q", name)
	}
	if _, _, err := tundev.Open(name, 0, 0); func() bool { ue, ok := errors.AsType[*uerr.Error](err); return !ok || ue.Kind != uerr.Conflict }() {
		t.Errorf("a second device of the name: %v", err)
	}
	dev, err := tundev.New(f)
	if err != nil {
		t.Fatal(err)
	}
	l, err := osroute.Find(name)
	if err != nil || !l.TUN || l.Owner != 4711 || l.MTU != tundev.DefaultMTU {
		t.Errorf("link %+v, %v", l, err)
	}
	if out, err := exec.Command("sh", "-ec", "ip addr add 10.7.0.1/24 dev "+name+"; ip link set "+name+" up").CombinedOutput(); err != nil {
		t.Skipf("ip: %s", out)
	}
	if got, err := dev.Name(); got != name || err != nil {
		t.Errorf("Name: %q, %v", got, err)
	}

	// Out: a datagram comes as one packet, with the checksum left to us.
	c, err := net.Dial("udp", "10.7.0.2:99")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("hello"))
	buf := make([]byte, tundev.MaxPacket)
	var p []byte
	for { // past router solicitations
		n, h, err := dev.ReadPacket(buf)
		if err != nil {
			t.Fatal(err)
		}
		if p = buf[:n]; p[0]>>4 == 4 && p[9] == 17 {
			if !h.NeedsCsum || h.CsumStart != 20 || h.CsumOffset != 6 {
				t.Errorf("header %+v", h)
			}
			break
		}
	}
	if !strings.HasSuffix(string(p), "hello") {
		t.Errorf("packet %x", p)
	}

	// In: the answer, in many parts, its checksum left to the kernel.
	reply := bytes.Clone(p)
	copy(reply[12:16], p[16:20])
	copy(reply[16:20], p[12:16])
	copy(reply[20:22], p[22:24])
	copy(reply[22:24], p[20:22])
	var parts [][]byte
	for i := range reply {
		parts = append(parts, reply[i:i+1], nil)
	}
	if err := dev.WritePacket(tundev.Header{NeedsCsum: true, CsumStart: 20, CsumOffset: 6}, parts); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10)
	if n, err := c.Read(got); err != nil || string(got[:n]) != "hello" {
		t.Errorf("application read %q, %v", got[:n], err)
	}
	if err := dev.WritePacket(tundev.Header{NeedsCsum: true, CsumStart: 200}, [][]byte{reply}); err == nil {
		t.Error("checksum outside the packet accepted")
	}

	// Close ends a blocked read, and the device.
	ended := make(chan error, 1)
	go func() {
		for {
			if _, _, err := dev.ReadPacket(buf); err != nil {
				ended <- err
				return
			}
		}
	}()
	dev.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if _, err := osroute.Find(name); err == nil {
		t.Error("the device outlives its descriptor")
	}
}

func TestNewRefuses(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	if _, err := tundev.New(r); err == nil {
		t.Error("a pipe is accepted as TUN")
	}
	if _, err := r.Stat(); err != nil {
		t.Errorf("New must not close what it refuses: %v", err)
	}
}
