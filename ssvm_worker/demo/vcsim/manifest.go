package main

import (
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// sums contains the checksums of one file as it was transferred.
type sums struct {
	mu           sync.Mutex
	sha1, sha256 hash.Hash
	size         int64
	// stored is the local file that is sent, if there is one. Its checksums are computed once, and not in each transfer:
	// a real host uses other cores than its client.
	stored string
}

// digests contains the checksums in hex, and the size of the data that they are about.
type digests struct {
	sha1, sha256 string
	size         int64
}

// known contains the digests of stored files.
var known sync.Map

func (s *sums) add(data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size += int64(len(data))
	if s.stored == "" {
		s.sha1.Write(data)
		s.sha256.Write(data)
	}
}

// digests returns the checksums so far.
func (s *sums) digests() digests {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := ""
	if file, err := os.Open(s.stored); err == nil {
		defer file.Close()
		if info, err := file.Stat(); err == nil {
			key = fmt.Sprint(s.size, info.ModTime().UnixNano(), s.stored)
		}
		if found, ok := known.Load(key); ok {
			return found.(digests)
		}
		s.sha1.Reset()
		s.sha256.Reset()
		_, _ = io.CopyN(io.MultiWriter(s.sha1, s.sha256), file, s.size)
	}
	found := digests{hex.EncodeToString(s.sha1.Sum(nil)), hex.EncodeToString(s.sha256.Sum(nil)), s.size}
	if key != "" {
		known.Store(key, found)
	}
	return found
}

// checkedLease is a lease with a manifest of the transferred files.
type checkedLease struct {
	*simulator.HttpNfcLease
	world *world
	mine  *lease
}

// HttpNfcLeaseSetManifestChecksumType sets the checksum types of files, by their keys.
func (l *checkedLease) HttpNfcLeaseSetManifestChecksumType(req *types.HttpNfcLeaseSetManifestChecksumType) soapFault {
	for _, each := range req.DeviceUrlsToChecksumTypes {
		l.mine.chosen[each.Key] = each.Value
	}
	return &methods.HttpNfcLeaseSetManifestChecksumTypeBody{
		Res: new(types.HttpNfcLeaseSetManifestChecksumTypeResponse),
	}
}

// HttpNfcLeaseGetManifest returns the checksums of the transferred files.
func (l *checkedLease) HttpNfcLeaseGetManifest(*types.HttpNfcLeaseGetManifest) soapFault {
	now, _ := l.world.now()
	kind := now.Manifest
	if l.mine.undo != nil && now.UploadManifest != "" {
		kind = now.UploadManifest
	}
	l.world.mu.Lock()
	defer l.world.mu.Unlock()
	entries := []types.HttpNfcLeaseManifestEntry{}
	for _, each := range l.Info.DeviceUrl {
		sent := l.mine.sent[each.TargetId]
		if sent == nil || kind == "absent" {
			continue
		}
		found := sent.digests()
		entry := types.HttpNfcLeaseManifestEntry{Key: each.Key, Size: found.size, Disk: *each.Disk, Sha1: found.sha1}
		if l.mine.chosen[each.Key] == "sha256" {
			entry.ChecksumType, entry.Checksum = "sha256", found.sha256
		}
		if kind == "wrong" {
			entry.Sha1, entry.Checksum = strings.Repeat("0", 40), strings.Repeat("0", len(entry.Checksum))
		}
		if kind == "zero_size" {
			entry.Size = 0
		}
		entries = append(entries, entry)
	}
	return &methods.HttpNfcLeaseGetManifestBody{Res: &types.HttpNfcLeaseGetManifestResponse{Returnval: entries}}
}
